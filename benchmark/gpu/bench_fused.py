"""The element-wise steps around projections and attention: bytes they must move over time.

One layer, a chunk of 8192 tokens of the 8B shape. Each has a few variants; the best is what the
defaults in ``tca_kernels`` should be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from bench_run import BenchRun
from kernel_inputs import Shape
from timing import stream_ms
from torch import Tensor

from tca_kernels import fused
from tca_kernels.append import write_kv

HIDDEN, INNER = 4096, 14336


def table(run: BenchRun, shape: Shape, kv: Tensor) -> None:
    tokens, pieces = (64, 4) if run.tiny else (8192, 4)
    hidden, inner = (64, 128) if run.tiny else (HIDDEN, INNER)
    heads = shape.num_q_heads + 2 * shape.num_kv_heads
    element = kv.element_size()

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=run.device).to(run.dtype)

    qkv = random(tokens, heads, shape.head_dim)
    cos, sin = random(2, tokens, 1, shape.head_dim)
    x, weight, gate_up = random(tokens, hidden), random(hidden), random(tokens, 2 * inner)
    q, k = qkv[:, : shape.num_q_heads], qkv[:, shape.num_q_heads : -shape.num_kv_heads]
    rotated = qkv[:, : -shape.num_kv_heads]
    slots = torch.randperm(len(kv), device=run.device)[: tokens * shape.num_kv_heads]
    slots = slots.view(tokens, shape.num_kv_heads).to(torch.int32)
    group = shape.num_q_heads // shape.num_kv_heads * shape.head_dim
    packed = random(pieces, shape.num_kv_heads, tokens // pieces, group)
    q_rows = q.flatten(1).unflatten(0, (pieces, -1)).unflatten(2, (shape.num_kv_heads, group))

    def measure(step: str, variant: str, moved: int, work: Callable[[], object]) -> None:
        ms = stream_ms(work, run.device)
        share = moved * element / (ms * 1e-3) / run.copy
        run.record("fused", step=step, variant=variant, us=ms * 1e3, of_copy=share)

    norm = partial(F.rms_norm, x, (hidden,), weight, 1e-5)
    measure("norm", "torch", 2 * x.numel(), norm)
    measure("norm", "", 2 * x.numel(), partial(fused.rms_norm, x, weight, 1e-5))
    turned = 2 * rotated.numel() + 2 * cos.numel()
    for count, warps in ((16, 2), (16, 1), (32, 4), (64, 4), (64, 8)):
        with_tile = partial(fused.rotate, rotated, cos, sin, (count, warps))
        measure("rotate", f"{count} heads, {warps} warps", turned, with_tile)
    for size, warps in ((2048, 4), (1024, 4), (2048, 8), (4096, 8), (1024, 2)):
        with_tile = partial(fused.silu_mul, gate_up, (size, warps))
        measure("silu", f"{size}, {warps} warps", 3 * tokens * inner, with_tile)
    target = packed.transpose(1, 2)
    for elements, warps in ((4096, 4), (2048, 4), (8192, 4), (8192, 8), (16384, 8)):
        name = f"{elements}, {warps} warps"
        copies = partial(fused.copy_rows, tile=(elements, warps))
        measure("pack", name, 2 * packed.numel(), partial(copies, q_rows, target))
        measure("unpack", name, 2 * packed.numel(), partial(copies, target, q_rows))
    values = qkv[:, -shape.num_kv_heads :]
    measure("write", "", 4 * k.numel(), partial(write_kv, k, values, kv, slots))
