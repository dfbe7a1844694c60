"""Correctness and speed of the Triton kernels on one GPU, beside the ceilings of the same run.

    PYTHONPATH=kernels python benchmark/gpu/bench_kernels.py

``--tiny`` is a dry run of every section on a machine without a GPU, under Triton's interpreter.
All times are of one layer unless a column says otherwise; microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# Read when triton is first imported.
if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import bench_decode
import bench_fused
import bench_selection
import torch
from bench_run import BenchRun
from check_kernels import run_checks
from kernel_inputs import LLAMA_8B, QWEN_7B
from timing import copy_bandwidth, matmul_flops
from torch import Tensor

from tca_kernels import dispatch

SECTIONS = ["decode", "selection", "fused"]


def check(run: BenchRun) -> bool:
    dtypes = [torch.float16, torch.float32] if run.tiny else [torch.bfloat16, torch.float16]
    failed = checks = 0
    for name, error, allowed in run_checks(run.device, dtypes, 256 if run.tiny else 16384):
        checks += 1
        if not error <= allowed:
            failed += 1
            run.record("WRONG", kernel=name, error=error, allowed=allowed)
    run.record("check", checks=checks, failed=failed, seconds=run.elapsed)
    return failed == 0


def measure(run: BenchRun, sections: list[str], flashinfer: bool) -> None:
    run.copy, run.matmul = copy_bandwidth(run.device), matmul_flops(run.device)
    run.record("ceiling", copy_gbps=run.copy / 1e9, matmul_tflops=run.matmul / 1e12)
    kv = run.pool(LLAMA_8B, 20_000 if run.tiny else 36_000_000)
    if "decode" in sections:
        measure_decode(run, kv, flashinfer)
    if "selection" in sections:
        score_config = bench_selection.sweep(run, LLAMA_8B, kv)
        bench_selection.table(run, LLAMA_8B, kv, score_config)
    if "fused" in sections:
        bench_fused.table(run, LLAMA_8B, kv)


def measure_decode(run: BenchRun, kv: Tensor, flashinfer: bool) -> None:
    config = bench_decode.sweep(run, LLAMA_8B, kv)
    bench_decode.table(run, "8b", LLAMA_8B, kv, config, flashinfer)
    bench_decode.plans(run, LLAMA_8B, config)
    bench_decode.writes(run, LLAMA_8B, kv)
    if not run.tiny:
        bench_decode.table(run, "qwen-7b", QWEN_7B, kv, config, flashinfer)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the Triton kernels.")
    parser.add_argument("--tiny", action="store_true", help="dry run without a GPU")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--flashinfer", action="store_true", help="time FlashInfer's decode too")
    parser.add_argument("--seconds", type=float, default=210, help="start nothing new after this")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmark/results"))
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cpu" if args.tiny else "cuda")
    if args.tiny:
        dispatch.use_triton = lambda tensor: True
    run = BenchRun(device, torch.float16 if args.tiny else torch.bfloat16, args.seconds, args.tiny)
    gpu = "interpreter" if args.tiny else torch.cuda.get_device_name()
    run.record("machine", gpu=gpu, torch=torch.__version__)
    correct = check(run)
    measure(run, args.only, args.flashinfer)
    run.record("done", seconds=run.elapsed, out_of_time=run.late)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "kernels.json"
    path.write_text(json.dumps(run.results, indent=1))
    print("wrote", path)
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
