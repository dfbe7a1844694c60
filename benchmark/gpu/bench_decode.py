"""Decode attention, its plan, and the writes of a decode step."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from bench_run import BenchRun
from kernel_inputs import DecodeInputs, Shape, decode_inputs, kept_lengths
from timing import graph_ms, stream_ms
from torch import Tensor

from tca_kernels.append import append_slots, write_kv
from tca_kernels.decode import DecodeConfig, DecodeWorkspace, decode_attention, default_config

# (tile, num_warps, num_stages, programs_per_sm)
CONFIGS = [
    DecodeConfig(*row)
    for row in (
        (64, 4, 3, 3),
        (64, 4, 3, 6),
        (64, 4, 3, 12),
        (64, 4, 2, 4),
        (64, 4, 2, 5),
        (64, 4, 4, 2),
        (64, 2, 3, 3),
        (64, 8, 3, 3),
        (32, 4, 4, 4),
        (32, 4, 3, 6),
        (32, 2, 4, 4),
        (128, 4, 2, 3),
        (128, 8, 2, 3),
        (128, 8, 3, 1),
    )
]


def make_workspace(run: BenchRun, shape: Shape, length: Tensor, config: DecodeConfig) -> Any:
    batch, layers, _ = length.shape
    sizes = (batch, layers, shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
    return DecodeWorkspace(*sizes, run.dtype, run.device, config)


def decode_ms(
    run: BenchRun, shape: Shape, kv: Tensor, inputs: DecodeInputs, config: DecodeConfig
) -> float:
    """Time of one layer's attention; the step's plan is spread over its layers."""
    layers = inputs.length.shape[1]
    workspace = make_workspace(run, shape, inputs.length, config)

    def step() -> None:
        workspace.plan(inputs.length)
        for layer in range(layers):
            decode_attention(
                inputs.q,
                kv,
                inputs.arena,
                inputs.start[:, layer],
                inputs.length[:, layer],
                shape.head_dim**-0.5,
                workspace=workspace,
                layer=layer,
            )

    return graph_ms(step, run.device) / layers


def layers_for(run: BenchRun, entries: int, context: int, kept: float, num_slots: int) -> int:
    """Enough layers that replays do not find their data in the L2 cache."""
    per_layer = entries * context * kept
    return 1 if run.tiny else max(1, min(32, int(8e6 / per_layer) + 1, int(num_slots / per_layer)))


def make_inputs(
    run: BenchRun,
    shape: Shape,
    kv: Tensor,
    batch: int,
    context: int,
    kept: float,
    scattered: bool = True,
) -> DecodeInputs:
    layers = layers_for(run, batch * shape.num_kv_heads, context, kept, len(kv))
    length = kept_lengths(layers, batch, shape.num_kv_heads, context, kept, context // 256)
    return decode_inputs(shape, kv, length, scattered)


def sweep(run: BenchRun, shape: Shape, kv: Tensor) -> DecodeConfig:
    """Time every configuration on one ragged case and return the best."""
    best, best_ms = default_config(shape.head_dim, run.dtype), float("inf")
    inputs = make_inputs(run, shape, kv, 1 if run.tiny else 8, 64 if run.tiny else 131072, 0.39)
    for config in CONFIGS[:2] if run.tiny else CONFIGS:
        if run.late:
            break
        ms = decode_ms(run, shape, kv, inputs, config)
        share = inputs.kept_bytes / ms * 1e3 / run.copy
        run.record("sweep", **asdict(config), us=ms * 1e3, share_of_copy=share)
        if ms < best_ms:
            best, best_ms = config, ms
    return best


def table(
    run: BenchRun, name: str, shape: Shape, kv: Tensor, config: DecodeConfig, flashinfer: bool
) -> None:
    contexts = (64,) if run.tiny else (32768, 131072)
    batches = (1,) if run.tiny else (1, 8, 32)
    lists = ((1.0, True), (0.39, True), (0.39, False))
    for context, batch, (kept, scattered) in itertools.product(contexts, batches, lists):
        if run.late:
            return
        inputs = make_inputs(run, shape, kv, batch, context, kept, scattered)
        ms = decode_ms(run, shape, kv, inputs, config)
        rate = inputs.kept_bytes / ms * 1e3
        row: dict[str, Any] = {"shape": name, "context": context, "batch": batch, "kept": kept}
        row |= {"scattered": scattered, "layers": inputs.length.shape[1], "us": ms * 1e3}
        row |= {"GB/s": rate / 1e9, "share_of_copy": rate / run.copy}
        if flashinfer:
            row["flashinfer_us"] = flashinfer_ms(run, shape, kv, inputs) * 1e3
        run.record("decode", **row)


def flashinfer_ms(run: BenchRun, shape: Shape, kv: Tensor, inputs: DecodeInputs) -> float:
    """FlashInfer's paged decode of the first layer, KV heads as batch entries; plan not counted."""
    import flashinfer

    length = inputs.length[:, 0].flatten().cpu()
    entries, group = len(length), shape.num_q_heads // shape.num_kv_heads
    bounds = zip(inputs.start[:, 0].flatten().tolist(), length.tolist(), strict=True)
    indices = torch.cat([inputs.arena[s : s + n] for s, n in bounds])
    indptr = torch.zeros(entries + 1, dtype=torch.int32)
    indptr[1:] = length.cumsum(0)
    buffer = torch.empty(256 << 20, dtype=torch.uint8, device=run.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(buffer, "NHD", use_tensor_cores=True)
    last_page = torch.ones(entries, dtype=torch.int32)
    types = {"q_data_type": run.dtype, "kv_data_type": run.dtype}
    wrapper.plan(indptr, indices, last_page, group, 1, shape.head_dim, 1, **types)
    q = inputs.q.view(entries, group, shape.head_dim)
    pages = kv.view(len(kv), 2, 1, 1, shape.head_dim)
    return stream_ms(lambda: wrapper.run(q, pages), run.device)


def plans(run: BenchRun, shape: Shape, config: DecodeConfig) -> None:
    layers = 2 if run.tiny else 32
    for batch in (2,) if run.tiny else (1, 8, 64):
        length = kept_lengths(layers, batch, shape.num_kv_heads, 32768, 0.39, 512).to(run.device)
        workspace = make_workspace(run, shape, length, config)
        ms = graph_ms(partial(workspace.plan, length), run.device)
        run.record("plan", batch=batch, layers=layers, us_per_step=ms * 1e3)


def writes(run: BenchRun, shape: Shape, kv: Tensor) -> None:
    heads, q_heads = shape.num_kv_heads, shape.num_q_heads
    for tokens in (8,) if run.tiny else (8, 64, 8192):
        size = (tokens, q_heads + 2 * heads, shape.head_dim)
        qkv = torch.randn(size, device=run.device).to(run.dtype)
        slots = torch.randperm(len(kv), device=run.device)[: tokens * heads].to(torch.int32)
        args = (qkv[:, q_heads:-heads], qkv[:, -heads:], kv, slots.view(tokens, heads))
        ms = graph_ms(partial(write_kv, *args), run.device)
        run.record("write", tokens=tokens, us=ms * 1e3)
    batch, layers = (1, 2) if run.tiny else (8, 32)
    length = torch.zeros(batch, layers, heads, dtype=torch.int32, device=run.device)
    start = torch.arange(length.numel(), device=run.device).view(length.shape) * 1024
    arena = torch.zeros(length.numel() * 1024, dtype=torch.int32, device=run.device)
    new = torch.zeros(layers, batch, heads, dtype=torch.int32, device=run.device).transpose(0, 1)
    ms = graph_ms(partial(append_slots, arena, start, length, new), run.device)
    run.record("append", batch=batch, layers=layers, us=ms * 1e3)
