"""The decode views of all prompts that end in a step, chosen together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tca_kernels.dispatch import upload
from tca_kernels.gather import view_slots
from tca_kernels.score import probe_scores
from tca_kernels.select import BlockScore, block_scores, select
from tca_runtime.attention.base import AttentionShape
from tca_runtime.cache.runs import bounded, even_cuts, joined
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.sparsity.budget import BudgetTable, levels
from tca_runtime.sparsity.chooser import ChunkSelection, DecodeView, rungs
from tca_runtime.sparsity.policies.tca import TCAPolicy

# List entries that are selected from together; bounds the memory of lists, scores and all that
# is made of them, up to 20 bytes an entry.
ENTRIES_AT_ONCE = 1 << 25

# Importances raised at a time: bounds what their int64 slots take.
REMEMBERED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Ranking:
    """What requests must have in common to be selected for together."""

    policy: TCAPolicy
    block: int
    probes: int

    @property
    def score(self) -> BlockScore:
        return self.policy.score

    @property
    def descending(self) -> bool:
        """The most concentrated blocks keep the least."""
        return self.policy.concentrated_keeps == "few"

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(levels(self.block).tolist())


@dataclass(frozen=True, eq=False)
class _Scored:
    """Some layers' lists of one request, and the scores of their first ``num_candidates`` tokens.

    Attributes
    ----------
    slots : int32 ``[rows, tokens]``
    scores : float32 ``[rows * num_candidates]``, row after row
    """

    work: ChunkSelection
    num_candidates: int
    slots: Tensor
    scores: Tensor

    @property
    def num_tokens(self) -> int:
        return self.work.lists.end


class BatchedDecodeViews:
    """Chooses from what the candidates of some layers have scored.

    Parameters
    ----------
    scored : each with candidates for its decode view
    layers : which; all of them where a request limits the dropped mass
    """

    def __init__(
        self,
        scored: Sequence[_Scored],
        layers: slice,
        ranking: Ranking,
        pool: SlotPool,
    ) -> None:
        self._scored = scored
        self._layers = layers
        self._rows = len(scored[0].slots)
        self._ranking = ranking
        self._pool = pool

    def choose(self) -> list[DecodeView]:
        """Each request's view; remembers the scores in the pool."""
        self._remember()
        free = [one for one in self._scored if one.work.request.max_dropped_mass is None]
        together = iter(self._views(free, [one.work.request.settings.decode for one in free]))
        return [
            next(together) if one.work.request.max_dropped_mass is None else self._climb(one)
            for one in self._scored
        ]

    def _climb(self, one: _Scored) -> DecodeView:
        """The smallest rung whose dropped mass the request allows."""
        request = one.work.request
        assert request.max_dropped_mass is not None
        for ratio in rungs(self._ranking.block):
            (view,) = self._views([one], [request.settings.decode.at_ratio(ratio)])
            if float(view.dropped_mass) <= request.max_dropped_mass:
                break
        return view

    def _remember(self) -> None:
        """Raise the slots' accumulated importance to the scores; requests may share slots."""
        best = self._pool.importance
        slots = joined([one.slots[:, : one.num_candidates].flatten() for one in self._scored])
        scores = joined([one.scores for one in self._scored])
        parts = slots.split(REMEMBERED_AT_ONCE), scores.split(REMEMBERED_AT_ONCE)
        for some, new in zip(*parts, strict=True):
            best.scatter_reduce_(0, some.long(), new.to(best.dtype), "amax")

    def _views(self, scored: Sequence[_Scored], budgets: Sequence[BudgetTable]) -> list[DecodeView]:
        if not scored:
            return []
        rows, ranking = self._rows, self._ranking
        blocks = [one.num_candidates // ranking.block for one in scored]
        counts = [b.level_counts(n)[self._layers] for b, n in zip(budgets, blocks, strict=True)]
        scores = joined([one.scores for one in scored])
        chosen = select(
            scores,
            block_scores(scores, ranking.block, ranking.score),
            torch.tensor(blocks).repeat_interleave(rows),
            torch.from_numpy(np.stack(counts)).flatten(0, 2),
            ranking.levels,
            descending=ranking.descending,
        )
        arena = joined([one.slots.flatten() for one in scored])
        lengths = torch.tensor([one.num_tokens for one in scored]).repeat_interleave(rows)
        candidates = torch.tensor([one.num_candidates for one in scored]).repeat_interleave(rows)
        start = upload(lengths.cumsum(0) - lengths, arena.device)
        view = view_slots(arena, start, candidates, lengths, chosen)
        sizes = view.indptr.diff().view(len(scored), rows)
        slots = view.slots.split(sizes.sum(1).tolist())
        dropped = chosen.dropped_mass.view(len(scored), rows).mean(1)
        return [
            DecodeView(
                lengths=sizes[i].numpy(),
                slots=slots[i],
                num_tokens=one.num_tokens,
                dropped_mass=dropped[i],
                report=_report(slots[i].numel() / one.slots.numel(), ranking),
            )
            for i, one in enumerate(scored)
        ]


def views_of_queries(
    works: Sequence[ChunkSelection],
    latest: Tensor,
    ranking: Ranking,
    shape: AttentionShape,
    pool: SlotPool,
) -> list[DecodeView]:
    """Decode views by queries that are at hand: all layers of many requests in one scoring.

    Parameters
    ----------
    works : each with candidates for its decode view
    latest : ``[B, L, P, Hq, D]``, the queries of each request's last ``ranking.probes`` tokens
    """
    views: list[DecodeView] = []
    for part in bounded([work.lists.num_slots for work in works], ENTRIES_AT_ONCE):
        some, queries = works[part], latest[part]
        groups = [
            _views_of_layers(some, layers, queries[:, layers], ranking, shape, pool)
            for layers in _layer_groups(some, shape.num_layers)
        ]
        views += [_over_layers(parts, ranking) for parts in zip(*groups, strict=True)]
    return views


def _views_of_layers(
    works: Sequence[ChunkSelection],
    layers: slice,
    latest: Tensor,
    ranking: Ranking,
    shape: AttentionShape,
    pool: SlotPool,
) -> list[DecodeView]:
    heads = shape.num_kv_heads
    slots = [work.lists.dense()[layers.start * heads : layers.stop * heads] for work in works]
    arena, rows = joined([own.flatten() for own in slots]), len(slots[0])
    lengths = torch.tensor([work.lists.end for work in works]).repeat_interleave(rows)
    start = upload(lengths.cumsum(0) - lengths, arena.device).view(-1, shape.num_kv_heads)
    counts = [num_candidates(work) for work in works]
    scores = probe_scores(
        latest.flatten(0, 1),
        pool.kv,
        arena,
        start,
        lengths.view(start.shape),
        torch.tensor(counts).repeat_interleave(rows).view(start.shape),
        shape.scale,
    )
    by_request = scores.split([count * rows for count in counts])
    scored = [_Scored(*one) for one in zip(works, counts, slots, by_request, strict=True)]
    return BatchedDecodeViews(scored, layers, ranking, pool).choose()


def _over_layers(parts: Sequence[DecodeView], ranking: Ranking) -> DecodeView:
    """One view from those of all runs of layers."""
    if len(parts) == 1:
        return parts[0]
    slots = torch.cat([part.slots for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    masses = [part.dropped_mass * len(part.lengths) for part in parts]
    num_tokens = parts[0].num_tokens
    return DecodeView(
        lengths=lengths,
        slots=slots,
        num_tokens=num_tokens,
        dropped_mass=torch.stack(masses).sum() / len(lengths),
        report=_report(slots.numel() / (num_tokens * len(lengths)), ranking),
    )


def _report(kept: float, ranking: Ranking) -> dict[str, Any]:
    return {"kept_ratio": kept, "probes": ranking.probes}


def num_candidates(work: ChunkSelection) -> int:
    """Tokens from the list's begin on that a decode view may drop."""
    return work.decode.num_candidates if work.decode is not None else 0


def _layer_groups(works: Sequence[ChunkSelection], num_layers: int) -> list[slice]:
    """Runs of layers of which no more entries are selected from at once, if it can be helped.

    A limit on the dropped mass is on the mean of all layers.
    """
    entries = sum(work.lists.num_slots for work in works)
    at_once = max(num_layers * ENTRIES_AT_ONCE // max(entries, 1), 1)
    if any(work.request.max_dropped_mass is not None for work in works):
        at_once = num_layers
    cuts = even_cuts(0, num_layers, at_once)
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
