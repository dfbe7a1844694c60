"""Where the device's time goes: kernel times of some work, summed by what they are for."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# The first name that is part of a kernel's decides.
GROUPS = {
    "probe_": "score",
    "paired_": "score",
    "block_": "select",
    "row_sum": "select",
    "view_slots": "gather",
    "gather_kernel": "gather",
    "PrefillWithKVCache": "attention",
    "Prefill": "attention",
    "write_kv": "write",
    "nvjet": "projections",
    "gemm": "projections",
    "cutlass": "projections",
    "layer_norm": "norm",
    "rms_norm": "norm",
    "rotate": "rotation",
    "silu": "activation",
    "copy_rows": "layout",
}


def kernel_shares(work: Callable[[], None]) -> dict[str, float]:
    """Milliseconds per group, their sum, and the wall time of the work."""
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=False) as recorded:
        work()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    groups: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        group = next((g for part, g in GROUPS.items() if part in event.key), "other")
        groups[group] += event.self_device_time_total / 1e3
        names[event.key] += event.self_device_time_total / 1e3
    for name, ms in sorted(names.items(), key=lambda item: -item[1])[:14]:
        print(f"   {ms:9.1f} ms  {name[:110]}")
    total = sum(groups.values())
    selection = sum(groups[g] for g in ("score", "select", "gather"))
    return {
        **dict(groups),
        "kernels_ms": total,
        "wall_ms": wall * 1e3,
        "selection_share": selection / (wall * 1e3),
    }
