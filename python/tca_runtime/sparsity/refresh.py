"""New decode views for requests that have generated a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tca_kernels.dispatch import upload
from tca_kernels.score import probe_scores
from tca_runtime.attention.base import AttentionShape
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.sparsity.batched import covers, ranking_of
from tca_runtime.sparsity.batched_decode import BatchedDecodeViews, Ranking, joined
from tca_runtime.sparsity.chooser import (
    ChunkSelection,
    DecodeView,
    RequestSparsity,
    StepSelection,
)
from tca_runtime.sparsity.recent_queries import RecentQueries

# List entries that are scored together; bounds the memory of their lists and scores.
ENTRIES_AT_ONCE = 1 << 27


@dataclass(frozen=True, eq=False)
class Outdated:
    """A request whose decode view is to be selected anew.

    Attributes
    ----------
    parts : everything that exists of its computed tokens, in order
    view : its row of the view table
    """

    request: RequestSparsity
    parts: Sequence[HeadSlots]
    view: int


@dataclass(frozen=True, eq=False)
class _Job:
    place: int
    work: ChunkSelection
    view: int


def refresh(
    outdated: Sequence[Outdated],
    queries: RecentQueries,
    shape: AttentionShape,
    pool: SlotPool,
    batched: bool,
) -> list[DecodeView | None]:
    """What each request's latest queries choose of everything before them; None for all of it.

    Nothing waits for the device where ``batched`` and the TCA policy over complete lists allow it.
    """
    views: list[DecodeView | None] = [None] * len(outdated)
    alike: dict[Ranking | None, list[_Job]] = {}
    for place, one in enumerate(outdated):
        probes = one.request.settings.num_refresh_probes
        work = ChunkSelection.plan(one.request, one.parts, probes, True, sees_past=True)
        if work is not None:
            ranking = ranking_of(work) if batched and covers([work]) else None
            alike.setdefault(ranking, []).append(_Job(place, work, one.view))
    for ranking, all_jobs in alike.items():
        for jobs in _bounded(all_jobs):
            if ranking is None:
                found: Sequence[DecodeView | None] = _layer_by_layer(jobs, queries, shape, pool)
            else:
                found = _at_once(jobs, ranking, queries, shape, pool)
            for job, view in zip(jobs, found, strict=True):
                views[job.place] = view
    return views


def _bounded(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Runs of jobs whose lists have ``ENTRIES_AT_ONCE`` entries at most, but one job at least."""
    run: list[_Job] = []
    entries = 0
    for job in jobs:
        size = job.work.lists.num_slots
        if run and entries + size > ENTRIES_AT_ONCE:
            yield run
            run, entries = [], 0
        run.append(job)
        entries += size
    yield run


def _at_once(
    jobs: Sequence[_Job],
    ranking: Ranking,
    queries: RecentQueries,
    shape: AttentionShape,
    pool: SlotPool,
) -> list[DecodeView]:
    """All layers of all requests are items of one scoring."""
    works = [job.work for job in jobs]
    lists = [work.lists for work in works]
    arena = joined([one.slots for one in lists])
    lengths = torch.tensor([one.end for one in lists]).repeat_interleave(shape.rows)
    start = upload(lengths.cumsum(0) - lengths, arena.device).view(-1, shape.num_kv_heads)
    counts = [work.decode.num_candidates if work.decode is not None else 0 for work in works]
    latest = queries.latest([job.view for job in jobs], [one.end for one in lists], ranking.probes)
    scores = probe_scores(
        latest.flatten(0, 1),
        pool.kv,
        arena,
        start,
        lengths.view(start.shape),
        torch.tensor(counts).repeat_interleave(shape.rows).view(start.shape),
        shape.scale,
    )
    views = BatchedDecodeViews(works, ranking, shape, pool)
    views.add(scores.split([count * shape.rows for count in counts]))
    return views.choose()


def _layer_by_layer(
    jobs: Sequence[_Job], queries: RecentQueries, shape: AttentionShape, pool: SlotPool
) -> list[DecodeView | None]:
    selection = StepSelection(shape, pool, [job.work for job in jobs])
    latest: list[Tensor] = [
        queries.latest([job.view], [job.work.lists.end], job.work.num_tokens)[0] for job in jobs
    ]
    for layer in range(shape.num_layers):
        for number, probes in enumerate(latest):
            selection(layer, number, probes[layer])
    return [selection.decode_view(number) for number in range(len(jobs))]
