"""Correctness on the device before anything is timed: every kernel against its reference."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_inputs import Shape, decode_inputs, kept_lengths, level_counts
from torch import Tensor

from tca_kernels import reference
from tca_kernels.append import append_slots, write_kv
from tca_kernels.decode import DecodeWorkspace, decode_attention
from tca_kernels.gather import gather_views, view_slots
from tca_kernels.score import probe_scores
from tca_kernels.select import block_scores, select

LEVELS = (1, 2, 4, 8, 16, 32, 64)
Check = tuple[str, float, float]


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def run_checks(device: torch.device, dtypes: list[torch.dtype], context: int) -> Iterator[Check]:
    """Yield (name, error, largest error allowed)."""
    for dtype in dtypes:
        for head_dim, group in ((64, 3), (128, 4), (256, 7)):
            yield from _check_attention(Shape(2 * group, 2, head_dim), dtype, context, device)
    yield from _check_selection(context, device)
    yield from _check_writes(device)


def _check_attention(
    shape: Shape, dtype: torch.dtype, context: int, device: torch.device
) -> Iterator[Check]:
    name = f"{str(dtype).removeprefix('torch.')} D={shape.head_dim} G={shape.num_q_heads // 2}"
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    scale = shape.head_dim**-0.5
    length = kept_lengths(2, 3, 2, context, 0.4, context // 8)
    length[1, 1, 0] = 0
    length[2, 0, 1] = 1
    kv = torch.randn(2 * int(length.sum()), 2, shape.head_dim, device=device).to(dtype)
    inputs = decode_inputs(shape, kv, length)
    workspace = DecodeWorkspace(3, 2, shape.num_q_heads, 2, shape.head_dim, dtype, device)
    workspace.plan(inputs.length)
    for layer in range(2):
        lists = (inputs.arena, inputs.start[:, layer], inputs.length[:, layer])
        out = torch.full_like(inputs.q, torch.nan)
        decode_attention(inputs.q, kv, *lists, scale, workspace=workspace, layer=layer, out=out)
        expected, _ = reference.decode_attention(inputs.q, kv, *lists, scale)
        yield f"decode {name}", relative_error(out, expected), allowed

    probes = 5
    lengths = torch.tensor([[context // 2] * 2, [context] * 2])
    counts = torch.tensor([[context // 4] * 2, [context - probes] * 2])
    arena = torch.randint(0, len(kv), (2 * context,), dtype=torch.int32, device=device)
    start = torch.tensor([0, context], device=device).expand(2, 2)
    q = torch.randn(2, probes, shape.num_q_heads, shape.head_dim, device=device).to(dtype)
    args = (q, kv, arena, start, lengths, counts, scale)
    error = relative_error(probe_scores(*args), reference.probe_scores(*args))
    yield f"score  {name}", error, allowed

    slots = arena[: context // 2]
    keys, values = gather_views(kv, slots)
    rows = kv[slots.long()]
    same = torch.equal(keys, rows[:, 0]) and torch.equal(values, rows[:, 1])
    yield f"gather {name}", 0.0 if same else 1.0, 0.0


def _check_selection(context: int, device: torch.device) -> Iterator[Check]:
    row_blocks = torch.tensor([context // 64, 1, 0, context // 128])
    counts = level_counts(row_blocks, LEVELS, 0.2)
    total = int(row_blocks.sum()) * 64
    for name, scores in (
        ("random", torch.rand(total, device=device) ** 8),
        ("ties", torch.randint(0, 4, (total,), device=device).float() / 64),
    ):
        for kind in ("raw-hhi", "normalised-hhi", "mass"):
            expected = reference.block_scores(scores, 64, kind)
            yield f"block {kind}", relative_error(block_scores(scores, 64, kind), expected), 1e-6
        ranking = reference.block_scores(scores, 64, "raw-hhi")
        for descending in (False, True):
            args = (scores, ranking, row_blocks, counts, LEVELS)
            chosen = select(*args, descending=descending)
            indices, dropped = reference.select(*args, descending)
            same = torch.equal(chosen.indices, indices)
            yield f"select {name}", 0.0 if same else 1.0, 0.0
            yield f"dropped mass {name}", relative_error(chosen.dropped_mass, dropped), 1e-5
    arena = torch.randperm(2 * total, device=device).to(torch.int32)
    start = torch.tensor([0, 7, 11, total // 2], device=device)
    lengths = row_blocks * 64 + 100
    view = view_slots(arena, start, row_blocks * 64, lengths, chosen)
    expected = reference.view_slots(
        arena, start, row_blocks * 64, lengths, chosen.indices, chosen.indptr
    )
    yield "view slots", 0.0 if torch.equal(view.slots, expected) else 1.0, 0.0


def _check_writes(device: torch.device) -> Iterator[Check]:
    k, v = torch.randn(2, 50, 4, 64, device=device)
    slots = torch.randperm(300, device=device)[:200].view(50, 4).to(torch.int32)
    slots[7] = -1
    pools = [torch.zeros(300, 2, 64, dtype=torch.float16, device=device) for _ in range(2)]
    write_kv(k, v, pools[0], slots)
    reference.write_kv(k, v, pools[1], slots)
    yield "write kv", 0.0 if torch.equal(*pools) else 1.0, 0.0
    length = torch.randint(0, 9, (4, 3, 2), dtype=torch.int32, device=device)
    start = torch.arange(24, device=device).view(4, 3, 2) * 10
    new = torch.randint(-1, 99, (3, 4, 2), dtype=torch.int32, device=device).transpose(0, 1)
    arenas = [torch.zeros(240, dtype=torch.int32, device=device) for _ in range(2)]
    lengths = [length.clone(), length.clone()]
    append_slots(arenas[0], start, lengths[0], new)
    reference.append_slots(arenas[1], start, lengths[1], new)
    same = torch.equal(*arenas) and torch.equal(*lengths)
    yield "append slots", 0.0 if same else 1.0, 0.0
