"""Every figure of docs/performance.md, in one command on a machine with one GPU.

    PYTHONPATH=kernels:python:. python benchmark/gpu/run_all.py --throughput model.gguf

A part that fails does not stop the others; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


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
    output = ["--output-dir", str(args.output_dir)]
    parts = [["bench_kernels.py", "--flashinfer", *output], ["bench_engine.py", *output]]
    parts += [["bench_throughput.py", model, *output] for model in args.throughput]
    figure = ["--output", str(args.output_dir / "scaling.svg")]
    parts.append(["plot_scaling.py", str(args.output_dir / "engine.json"), *figure])
    environment = dict(os.environ)
    search = [ROOT / "kernels", ROOT / "python", ROOT, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(str(place) for place in search if str(place))
    failed: list[str] = []
    for script, *options in parts:
        command = [sys.executable, str(HERE / script), *options]
        if subprocess.run(command, env=environment).returncode:
            failed.append(script)
    print("failed:", ", ".join(failed) or "nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
