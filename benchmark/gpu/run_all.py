"""Every figure of docs/performance.md, in one command on a machine with one GPU.

    PYTHONPATH=kernels:python:. python benchmark/gpu/run_all.py --throughput model.gguf

A part that fails does not stop the others; the exit status is 1 then. Beside long prompts the
server's streams are text, for which the first GGUF file lends its tokenizer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KEPT = ("uniform:0.39", "uniform:0.15,0.39")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run all GPU benchmarks, one after the other.")
    parser.add_argument(
        "--throughput",
        nargs="*",
        default=["llama-3.1-8b"],
        metavar="MODEL",
        help="GGUF files or shapes for the multi-turn comparison",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("benchmark/results"))
    args = parser.parse_args()
    environment = dict(os.environ)
    search = [ROOT / "kernels", ROOT / "python", ROOT, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(str(place) for place in search if str(place))
    failed: list[str] = []
    for name, *options in parts(args.throughput, args.output_dir):
        command = [sys.executable, *options]
        print("running", name, flush=True)
        if subprocess.run(command, env=environment, cwd=ROOT).returncode:
            failed.append(name)
    print("failed:", ", ".join(failed) or "nothing")
    return 1 if failed else 0


def parts(models: list[str], output_dir: Path) -> Iterator[list[str]]:
    """Names and arguments of Python, of each benchmark."""
    results = output_dir.resolve()
    output = ["--output-dir", str(results)]
    models = [str(Path(m).resolve()) if m.endswith(".gguf") else m for m in models]

    def script(name: str, *options: str) -> list[str]:
        return [name, str(HERE / name), *options]

    yield script("bench_kernels.py", "--flashinfer", *output)
    yield script("bench_engine.py", *output)
    yield script("bench_overlap.py", "--kept", KEPT[0], "--output", str(results / "overlap.json"))
    for model in models:
        yield script("bench_throughput.py", model, "--min-confidence", "0.7", *output)
    for kept in KEPT:
        if lender := next((model for model in models if model.endswith(".gguf")), None):
            yield ["bench_interference.py", *interference(kept, lender)]
    engine = str(results / "engine.json")
    yield script("plot_scaling.py", engine, "--output", str(results / "scaling.svg"))


def interference(kept: str, lender: str) -> list[str]:
    """Streams of the 8B shape beside long prompts; writes into ``benchmark/results``."""
    shape = f"--load-format dummy --model-config llama-3.1-8b --tokenizer-path {lender}"
    options = ["--model", "llama-3.1-8b", f"--flags={shape} --tca-config {kept}"]
    options += ["--long-prompt", "32000", "--stream-len", "6000"]
    options += ["--quiet", "10", "--busy", "20", "--settle", "3"]
    options += ["--name", f"interference-gpu-{kept.removeprefix('uniform:')}"]
    return ["-m", "benchmark.bench_interference", *options]


if __name__ == "__main__":
    sys.exit(main())
