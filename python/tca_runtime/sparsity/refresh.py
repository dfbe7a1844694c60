"""New decode views for requests that have generated a while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tca_runtime.attention.base import AttentionShape
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.sparsity.batched import covers, ranking_of
from tca_runtime.sparsity.batched_decode import Ranking, views_of_queries
from tca_runtime.sparsity.chooser import (
    ChunkSelection,
    DecodeView,
    RequestSparsity,
    StepSelection,
)
from tca_runtime.sparsity.recent_queries import RecentQueries


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
            ranking = ranking_of(work, probes) if batched and covers([work]) else None
            alike.setdefault(ranking, []).append(_Job(place, work, one.view))
    for ranking, jobs in alike.items():
        if ranking is None:
            found: Sequence[DecodeView | None] = _layer_by_layer(jobs, queries, shape, pool)
        else:
            ends = [job.work.lists.end for job in jobs]
            latest = queries.latest([job.view for job in jobs], ends, ranking.probes)
            found = views_of_queries([job.work for job in jobs], latest, ranking, shape, pool)
        for job, view in zip(jobs, found, strict=True):
            views[job.place] = view
    return views


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
