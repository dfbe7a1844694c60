"""Peak memory of calibrating with long prompts.

    python -m benchmark.bench_calibration_memory --model qwen2.5-coder-0.5b --length 32000

Runs ``tca_runtime.calibrate`` as a process of its own and reports its peak resident memory, beside
that of a process that only loads the model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmark.figures import Figure, format_figures, load_before, save_figures

LIMIT_GIB = 8.0
LOAD = "import sys; from tca_runtime.config import ModelArgs; from tca_runtime.models.loader import"
LOAD += " load_model; load_model(ModelArgs(model_path=sys.argv[1]))"


def peak_gib(command: list[str]) -> float:
    """Peak resident memory of a command that must succeed, read as it runs."""
    process = subprocess.Popen([sys.executable, *command])
    watched = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        try:
            memory = watched.memory_info()
        except psutil.NoSuchProcess:
            break
        peak = max(peak, memory.rss)
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"{command} failed")
    return peak / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak memory of a calibration on the CPU.")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--length", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--name", default="calibration_memory")
    args = parser.parse_args()
    settings = {**vars(args), "load_before": load_before()}
    loaded = peak_gib(["-c", LOAD, args.model])
    with tempfile.TemporaryDirectory() as directory:
        sizes = ["--samples", str(args.samples), "--length", str(args.length)]
        output = ["--output", str(Path(directory) / "found.json"), "--device", "cpu"]
        command = ["-m", "tca_runtime.calibrate", "--model-path", args.model, *sizes, *output]
        peak = peak_gib(command)
    figures = [
        Figure("only loading the model", loaded, "GiB"),
        Figure(f"calibrating at {args.length} tokens", peak, "GiB", "at most", LIMIT_GIB),
    ]
    print(format_figures(figures))
    print("written to", save_figures(args.name, settings, figures, {}))
    return 0 if figures[1].passed else 1


if __name__ == "__main__":
    sys.exit(main())
