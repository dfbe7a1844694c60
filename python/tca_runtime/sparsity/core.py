"""The core context of a cold prefix: what stays on the device when memory is short."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.sparsity.layout import Layout
from tca_runtime.sparsity.policies import Candidates
from tca_runtime.sparsity.policies.base import keep_best
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.settings import SparsitySettings


@dataclass(frozen=True, eq=False)
class BudgetedCore:
    """Keeps of each head what its decode budget allows, by accumulated importance.

    Ranks by the best importance that any selection gave a slot, so what some question once
    needed survives. Blocks that the run's ends cut are kept whole.
    """

    settings: SparsitySettings
    rows: int

    def __call__(self, slots: HeadSlots, importance: Tensor) -> Tensor | None:
        block, device = self.settings.block, importance.device
        index = _candidates(slots, block, self.rows, device)
        if index is None:
            return None
        num_blocks = index.shape[1] // block
        counts = self.settings.decode.level_counts(num_blocks)
        kept = self.settings.decode.kept_tokens(num_blocks).reshape(-1)
        if int(kept.sum()) == index.numel():
            return None
        nothing = torch.empty(0, device=device)
        candidates = Candidates(importance[index], nothing, block, 1.0, nothing, slots.slots[index])
        keep = torch.ones(slots.num_slots, dtype=torch.bool, device=device)
        keep[index] = TCAPolicy().choose(candidates, counts.reshape(-1, counts.shape[-1]), kept)
        return keep


@dataclass(frozen=True, eq=False)
class SharedCore:
    """As many slots as ``BudgetedCore`` keeps, but heads compete for them.

    Importances are attention weights, so those of different heads compare: a head that attends to
    a few places leaves its slots to heads that attend to many. Each keeps a part of its budget
    whatever the others need.

    Parameters
    ----------
    floor : share of a head's budget that it keeps in any case
    """

    settings: SparsitySettings
    rows: int
    floor: float = 0.25

    def __call__(self, slots: HeadSlots, importance: Tensor) -> Tensor | None:
        block, device = self.settings.block, importance.device
        index = _candidates(slots, block, self.rows, device)
        if index is None:
            return None
        budget = self.settings.decode.kept_tokens(index.shape[1] // block).reshape(-1)
        total = int(budget.sum())
        if total == index.numel():
            return None
        worth = importance[index]
        certain = keep_best(worth, (budget * self.floor).astype(np.int64))
        best = worth.masked_fill(certain, torch.inf).flatten().topk(total).indices
        keep = torch.ones(slots.num_slots, dtype=torch.bool, device=device)
        chosen = torch.zeros(index.numel(), dtype=torch.bool, device=device)
        chosen[best] = True
        keep[index] = chosen.view_as(index)
        return keep


def _candidates(slots: HeadSlots, block: int, rows: int, device: torch.device) -> Tensor | None:
    """Flat entries of what may be dropped: int64 ``[rows, n]``; None when nothing may."""
    layout = Layout.of([slots], slots.end, block)
    if not layout.num_candidates:
        return None
    begins = torch.from_numpy(slots.indptr[:-1]).to(device)
    return begins[:, None] + layout.entries(slice(0, rows), device)
