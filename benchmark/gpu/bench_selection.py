"""Selection for a chunk of prefill: scoring, block budgets, top-k, view, gather."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from functools import partial

import torch
from bench_run import BenchRun
from check_kernels import LEVELS, relative_error
from kernel_inputs import Shape, level_counts
from timing import host_ms, stream_ms
from torch import Tensor

from tca_kernels import reference
from tca_kernels.gather import gather_views, view_slots
from tca_kernels.score import ScoreConfig, probe_scores
from tca_kernels.select import block_scores, select

# (block, num_warps, num_stages, programs, paired)
CONFIGS = [
    ScoreConfig(*row)
    for row in (
        (64, 4, 3, 8, False),
        (64, 4, 2, 8, False),
        (128, 4, 2, 8, False),
        (64, 4, 3, 2, True),
        (64, 4, 3, 4, True),
        (64, 4, 3, 8, True),
        (64, 8, 3, 4, True),
        (128, 8, 3, 2, True),
        (128, 8, 3, 4, True),
    )
]


@dataclass(frozen=True)
class Chunk:
    """8192 queries of one request: four selections whose lists are prefixes of one another."""

    q: Tensor
    arena: Tensor
    start: Tensor
    lengths: Tensor
    counts: Tensor


def make_chunk(run: BenchRun, shape: Shape, kv: Tensor, context: int, probes: int) -> Chunk:
    heads = shape.num_kv_heads
    step, window = (64, 64) if run.tiny else (2048, 512)
    lengths = torch.tensor([context - 3 * step, context - 2 * step, context - step, context])
    counts = (lengths - step - window) // 64 * 64
    arena = torch.randperm(len(kv), device=run.device)[: heads * context].to(torch.int32)
    start = (torch.arange(heads, device=run.device) * context).expand(4, heads)
    q = torch.randn(4, probes, shape.num_q_heads, shape.head_dim, device=run.device)
    by_head = (lengths[:, None].expand(4, heads), counts[:, None].expand(4, heads))
    return Chunk(q.to(run.dtype), arena, start, *by_head)


def scorer(shape: Shape, kv: Tensor, chunk: Chunk, config: ScoreConfig | None) -> partial[Tensor]:
    lists = (kv, chunk.arena, chunk.start, chunk.lengths, chunk.counts)
    return partial(probe_scores, chunk.q, *lists, shape.head_dim**-0.5, config)


def sweep(run: BenchRun, shape: Shape, kv: Tensor) -> ScoreConfig | None:
    """Check and time every scoring configuration; return the best that is right."""
    small = make_chunk(run, shape, kv, 384 if run.tiny else 16384, 2 if run.tiny else 32)
    expected = reference.probe_scores(*scorer(shape, kv, small, None).args[:-1])
    chunk = make_chunk(run, shape, kv, 384 if run.tiny else 65536, 2 if run.tiny else 32)
    rows = chunk.q.shape[1] * shape.num_q_heads // shape.num_kv_heads
    flops = 2.0 * rows * shape.head_dim * float(chunk.lengths.sum() + chunk.counts.sum())
    best, best_ms = None, float("inf")
    for config in CONFIGS[:1] if run.tiny else CONFIGS:
        if run.late:
            break
        try:
            error = relative_error(scorer(shape, kv, small, config)(), expected)
            ms = stream_ms(scorer(shape, kv, chunk, config), run.device)
        except Exception as failure:
            run.record("score", **asdict(config), failed=repr(failure)[:200])
            continue
        run.record(
            "score",
            **asdict(config),
            us=ms * 1e3,
            of_matmul=flops / ms * 1e3 / run.matmul,
            error=error,
        )
        if ms < best_ms and error < 1e-2:
            best, best_ms = config, ms
    return best


def table(run: BenchRun, shape: Shape, kv: Tensor, config: ScoreConfig | None) -> None:
    """Device time of each stage, one layer."""
    contexts = (384,) if run.tiny else (32768, 65536, 131072)
    cases = ((2, 0.1),) if run.tiny else ((32, 0.1), (32, 0.39), (8, 0.1))
    for context, (probes, kept) in itertools.product(contexts, cases):
        if run.late:
            return
        chunk = make_chunk(run, shape, kv, context, probes)
        score = scorer(shape, kv, chunk, config)
        scores = score()
        blocks = chunk.counts.flatten() // 64
        counts = level_counts(blocks, LEVELS, kept)
        ranking = block_scores(scores, 64)
        choose = partial(select, scores, ranking, blocks, counts, LEVELS)
        chosen = choose()
        place = partial(view_slots, chunk.arena, chunk.start, chunk.counts, chunk.lengths, chosen)
        view = place()
        keys, values = gather_views(kv, view.slots)
        stages = {
            "score": score,
            "block": partial(block_scores, scores, 64),
            "select": choose,
            "view": place,
            "gather": partial(gather_views, kv, view.slots, keys, values),
        }
        device_us = {name: stream_ms(stage, run.device) * 1e3 for name, stage in stages.items()}
        moved = view.slots.numel() * 4 * shape.head_dim * kv.element_size()
        run.record(
            "selection",
            context=context,
            probes=probes,
            kept=float(chosen.indptr[-1]) / float(chunk.counts.sum()),
            **device_us,
            total=sum(device_us.values()),
            host_us=sum(host_ms(stage, 2) * 1e3 for stage in stages.values()),
            gather_of_copy=moved / device_us["gather"] * 1e6 / run.copy,
        )
