"""Choosing a layer's view: from importances to the slots that stay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tca_kernels.score import probe_scores
from torch import Tensor

from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.layout import Layout
from tca_runtime.sparsity.policies import Candidates, SelectionPolicy


@dataclass(frozen=True, eq=False)
class LayerLists:
    """The slot lists of one layer of one request, one after the other.

    Attributes
    ----------
    slots : int32 ``[sum(lengths)]``
    lengths : int64 ``[Hkv]``, on the host
    """

    slots: Tensor
    lengths: NDArray[np.int64]

    @property
    def begins(self) -> NDArray[np.int64]:
        return np.asarray(self.lengths.cumsum() - self.lengths)

    def candidate_index(self, layout: Layout, rows: slice) -> Tensor:
        """Flat index of every candidate: int64 ``[Hkv, n]``."""
        device = self.slots.device
        begins = torch.from_numpy(self.begins).to(device)
        return begins[:, None] + layout.entries(rows, device)


@dataclass(frozen=True, eq=False)
class Scored:
    """What the probes said about the candidates of one layer."""

    candidates: Candidates
    index: Tensor
    lists: LayerLists

    @staticmethod
    def measure(
        probes: Tensor, pool: Tensor, lists: LayerLists, index: Tensor, block: int, scale: float
    ) -> Scored:
        """Score every entry of the lists with ``probes`` (``[P, Hq, D]``).

        The lists end with the probes' own tokens; a probe sees nothing after itself.
        """
        device = lists.slots.device
        scores = probe_scores(
            probes,
            pool,
            lists.slots,
            torch.from_numpy(lists.begins).to(device),
            torch.from_numpy(lists.lengths.astype(np.int32)).to(device),
            scale,
        )
        candidates = Candidates(
            importance=scores[index],
            probes=probes,
            block=block,
            scale=scale,
            pool=pool,
            slots=lists.slots[index],
        )
        return Scored(candidates, index, lists)


@dataclass(frozen=True, eq=False)
class Selected:
    """A view of one layer: the kept slots, in list order, and the mass that was dropped.

    Attributes
    ----------
    lists : kept slots per head
    keep : bool ``[sum(old lengths)]``, over the entries of the lists selected from
    dropped_mass : float32 ``[Hkv]``, attention mass g of the dropped tokens
    """

    lists: LayerLists
    keep: Tensor
    dropped_mass: Tensor


def select(
    policy: SelectionPolicy, scored: Scored, budget: BudgetTable, rows: slice
) -> Selected:
    """Keep what ``policy`` chooses of the candidates within ``budget``, and all other entries."""
    candidates, old = scored.candidates, scored.lists
    num_blocks = candidates.importance.shape[-1] // candidates.block
    counts = budget.level_counts(num_blocks)
    kept = budget.kept_tokens(num_blocks).reshape(-1)[rows]
    chosen = policy.choose(candidates, counts.reshape(-1, counts.shape[-1])[rows], kept)
    keep = torch.ones(old.slots.shape[0], dtype=torch.bool, device=old.slots.device)
    keep[scored.index] = chosen
    lengths = old.lengths - candidates.importance.shape[-1] + kept
    dropped = (candidates.importance * ~chosen).sum(-1)
    lists = LayerLists(compact(old.slots, keep, int(lengths.sum())), lengths)
    return Selected(lists, keep, dropped)


def compact(values: Tensor, keep: Tensor, total: int) -> Tensor:
    """``values[keep]`` where the host knows that ``total`` remain, so nothing waits."""
    target = torch.cumsum(keep, 0) - 1
    target = torch.where(keep, target, total)
    out = torch.empty(total + 1, dtype=values.dtype, device=values.device)
    out[target] = values
    return out[:total]
