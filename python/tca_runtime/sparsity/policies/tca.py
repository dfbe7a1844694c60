"""TCA: block by block, the more a block matters the more of it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_runtime.sparsity.budget import levels
from tca_runtime.sparsity.policies.base import Candidates, SelectionPolicy


@dataclass(frozen=True)
class TCAPolicy(SelectionPolicy):
    r"""Core context chosen by the attention mass of the latest queries (arXiv 2512.09238).

    Each block of ``b`` candidates gets a score :math:`h_B = \sum_{j \in B} s_j^2` (HHI) of the
    tokens' importances. Blocks are sorted by it; the budget says how many of them keep 1, 2, 4,
    ..., b tokens, lowest scores fewest. Within a block the tokens of highest importance stay.

    Parameters
    ----------
    score : ``raw-hhi`` uses the global softmax as it is; ``normalised-hhi`` divides by the block's
        mass first, which measures concentration alone; ``mass`` is the plain sum
    concentrated_keeps : ``many`` gives high scores large levels, ``few`` is the literal reading of
        the paper for the normalised score
    """

    score: Literal["raw-hhi", "normalised-hhi", "mass"] = "raw-hhi"
    concentrated_keeps: Literal["many", "few"] = "many"

    def rank(self, candidates: Candidates) -> Tensor:
        return candidates.importance

    def block_scores(self, importance: Tensor, block: int) -> Tensor:
        """``h_B`` of every block: float32 ``[Hkv, n / block]``."""
        blocks = importance.view(importance.shape[0], -1, block)
        if self.score == "mass":
            score: Tensor = blocks.sum(-1)
            return score
        if self.score == "normalised-hhi":
            blocks = blocks / blocks.sum(-1, keepdim=True).clamp_min(1e-30)
        else:
            # Importances of 1e-6 square to denormals; the order is what matters.
            blocks = blocks * importance.shape[-1]
        score = blocks.square().sum(-1)
        return score

    def choose(
        self, candidates: Candidates, level_counts: NDArray[np.int64], kept: NDArray[np.int64]
    ) -> Tensor:
        importance = candidates.importance
        score = self.block_scores(importance, candidates.block)
        if self.concentrated_keeps == "few":
            score = -score
        order = torch.argsort(score, dim=-1, stable=True)
        by_rank = torch.from_numpy(level_counts).to(score.device)
        sizes = torch.from_numpy(levels(candidates.block)).to(score.device)
        heads, num_blocks = score.shape
        keep_at_rank = torch.repeat_interleave(
            sizes.repeat(heads), by_rank.flatten(), output_size=heads * num_blocks
        ).view(heads, num_blocks)
        keep = torch.empty_like(keep_at_rank).scatter_(-1, order, keep_at_rank)
        blocks = importance.view(heads, num_blocks, candidates.block)
        best = torch.argsort(blocks, dim=-1, descending=True, stable=True)
        place = torch.empty_like(best)
        places = torch.arange(candidates.block, device=score.device).expand_as(best)
        place.scatter_(-1, best, places)
        return (place < keep[..., None]).flatten(1)
