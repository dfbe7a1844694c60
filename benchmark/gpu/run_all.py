"""Every figure of docs/performance.md, in one command on a machine with one GPU.

    PYTHONPATH=kernels:python:. python benchmark/gpu/run_all.py --throughput model.gguf

A part that fails does not stop the others; the exit status is 1 then. With ``--gpus`` as many parts
run side by side, each on a card of its own. Beside long prompts the server's streams are text, for
which the first GGUF file lends its tokenizer.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PARTS = ("engine", "kernels", "overlap", "throughput", "interference")
KEPT = ("uniform:0.39", "uniform:0.15,0.39")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run all GPU benchmarks.")
    parser.add_argument(
        "--throughput",
        nargs="*",
        default=["llama-3.1-8b"],
        metavar="MODEL",
        help="GGUF files or shapes for the multi-turn comparison",
    )
    parser.add_argument(
        "--no-peer", action="store_true", help="without transformers, which takes minutes a model"
    )
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--gpus", type=int, default=1, help="cards to use, the first ones")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmark/results"))
    args = parser.parse_args()
    environment = dict(os.environ)
    search = [ROOT / "kernels", ROOT / "python", ROOT, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(str(place) for place in search if str(place))
    cards: queue.Queue[str] = queue.Queue()
    visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.gpus)))
    for card in visible.split(",")[: args.gpus]:
        cards.put(card)

    def succeeds(part: list[str]) -> bool:
        card = cards.get()
        print("running", part[0], "on card", card, flush=True)
        mine = environment | {"CUDA_VISIBLE_DEVICES": card}
        done = subprocess.run([sys.executable, *part[1:]], env=mine, cwd=ROOT)
        cards.put(card)
        return done.returncode == 0

    left_out = ["--skip", "transformers"] if args.no_peer else []
    todo = [
        part
        for part in parts(args.throughput, left_out, args.output_dir)
        if any(name in part[0] for name in args.only)
    ]
    with ThreadPoolExecutor(cards.qsize()) as pool:
        results = list(pool.map(succeeds, todo))
    failed = [part[0] for part, fine in zip(todo, results, strict=True) if not fine]
    if "engine" in args.only:
        draw = [sys.executable, *plot(args.output_dir.resolve())]
        if subprocess.run(draw, env=environment, cwd=ROOT).returncode:
            failed.append("plot")
    print("failed:", ", ".join(failed) or "nothing")
    return 1 if failed else 0


def parts(models: list[str], left_out: list[str], output_dir: Path) -> Iterator[list[str]]:
    """Names and arguments of Python, of each benchmark, the longest one first."""
    results = output_dir.resolve()
    output = ["--output-dir", str(results)]
    models = [str(Path(m).resolve()) if m.endswith(".gguf") else m for m in models]

    def script(name: str, *options: str) -> list[str]:
        return [name, str(HERE / name), *options]

    yield script("bench_engine.py", *output)
    yield script("bench_kernels.py", "--flashinfer", *output)
    yield script("bench_overlap.py", "--kept", KEPT[0], "--output", str(results / "overlap.json"))
    for model in models:
        options = ["--min-confidence", "0.7", *left_out, *output]
        yield script("bench_throughput.py", model, *options)
    for kept in KEPT:
        if lender := next((model for model in models if model.endswith(".gguf")), None):
            yield ["bench_interference.py", *interference(kept, lender)]


def plot(results: Path) -> list[str]:
    """The curves over the context length."""
    engine = str(results / "engine.json")
    return [str(HERE / "plot_scaling.py"), engine, "--output", str(results / "scaling.svg")]


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
