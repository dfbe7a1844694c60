"""Choosing a layer's view: from importances to the slots that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tca_kernels.score import probe_scores
from tca_runtime.attention.base import HeadLists
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.layout import Layout
from tca_runtime.sparsity.policies import Candidates, SelectionPolicy


@dataclass(frozen=True, eq=False)
class LayerScores:
    """What the probes gave every entry of one layer's lists.

    Attributes
    ----------
    lists : the lists, which end with the probes' own tokens
    scores : float32 ``[sum(lists.lengths)]``, importance per entry
    probes : ``[P, Hq, D]``
    """

    lists: HeadLists
    scores: Tensor
    probes: Tensor

    @staticmethod
    def measure(probes: Tensor, pool: Tensor, lists: HeadLists, scale: float) -> LayerScores:
        """Score every entry; a probe sees nothing after itself."""
        lengths = torch.from_numpy(lists.lengths)[None]
        starts = torch.from_numpy(lists.begins)[None].to(lists.slots.device)
        scores = probe_scores(probes[None], pool, lists.slots, starts, lengths, lengths, scale)
        return LayerScores(lists, scores, probes)

    def index(self, layout: Layout, rows: slice) -> Tensor:
        """Flat entry of every candidate: int64 ``[Hkv, n]``."""
        device = self.lists.slots.device
        begins = torch.from_numpy(self.lists.begins).to(device)
        return begins[:, None] + layout.entries(rows, device)

    def candidates(self, index: Tensor, pool: Tensor, block: int, scale: float) -> Candidates:
        return Candidates(
            importance=self.scores[index],
            probes=self.probes,
            block=block,
            scale=scale,
            pool=pool,
            slots=self.lists.slots[index],
        )


@dataclass(frozen=True, eq=False)
class Selected:
    """What stays of one layer's lists.

    Attributes
    ----------
    lists : kept entries
    keep : bool over the entries selected from
    dropped_mass : float32 ``[Hkv]``, attention mass g of the dropped candidates
    """

    lists: HeadLists
    keep: Tensor
    dropped_mass: Tensor


def select(
    policy: SelectionPolicy,
    candidates: Candidates,
    index: Tensor,
    lists: HeadLists,
    budget: BudgetTable,
    rows: slice,
    without_last: int = 0,
) -> Selected:
    """Keep what ``policy`` chooses of the candidates within ``budget``, and every other entry.

    Parameters
    ----------
    index : flat entry of every candidate
    rows : the layer's rows of the budget table
    without_last : entries at the end of every list that are left out (a chunk's own tokens)
    """
    num_candidates = candidates.importance.shape[-1]
    num_blocks = num_candidates // candidates.block
    counts = budget.level_counts(num_blocks)
    kept = budget.kept_tokens(num_blocks).reshape(-1)[rows]
    chosen = policy.choose(candidates, counts.reshape(-1, counts.shape[-1])[rows], kept)
    keep = torch.ones(len(lists.slots), dtype=torch.bool, device=lists.slots.device)
    keep[index] = chosen
    _forget_last(keep, lists, without_last)
    lengths = lists.lengths - num_candidates + kept - without_last
    dropped = (candidates.importance * ~chosen).sum(-1)
    slots = compact(lists.slots, keep, int(lengths.sum()))
    return Selected(HeadLists(slots, lengths), keep, dropped)


def _forget_last(keep: Tensor, lists: HeadLists, count: int) -> None:
    """Set ``keep`` to False for the last ``count`` entries of each list."""
    if count:
        ends = torch.from_numpy(lists.lengths.cumsum()).to(keep.device)
        keep[ends[:, None] - 1 - torch.arange(count, device=keep.device)] = False


def compact(values: Tensor, keep: Tensor, total: int) -> Tensor:
    """``values[keep]`` where the host knows that ``total`` remain, so nothing waits."""
    target = torch.where(keep, torch.cumsum(keep, 0) - 1, total)
    out = torch.empty(total + 1, dtype=values.dtype, device=values.device)
    out[target] = values
    return out[:total]
