"""Whole pages by attention: an answer's later tokens matter only once its first is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tca_runtime.sparsity.policies.base import (
    Candidates,
    SelectionPolicy,
    keep_best,
    require,
    require_page,
)


@dataclass(frozen=True)
class PagesPolicy(SelectionPolicy):
    r"""Small pages, ranked as TCA ranks blocks, are kept whole, with the pages that follow them.

    The probes of a prompt attend to where an answer begins; the tokens after it are attended to
    one by one while it is written. So a page's score also counts, a little less, for the pages
    after it.

    Parameters
    ----------
    page : tokens per page, a power of two
    score : ``hhi`` is :math:`\sum s_j^2`, ``mass`` :math:`\sum s_j`, ``max`` :math:`\max s_j` over
        the page's tokens
    after, before : following and preceding pages that a page's score reaches
    tokens : percent of the budget that goes to single tokens of most attention
    """

    page: int = 16
    score: Literal["hhi", "mass", "max"] = "hhi"
    after: int = 1
    before: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        require_page(self.page)
        require(self.after >= 0, f"after must not be negative, as {self.after} is")
        require(self.before >= 0, f"before must not be negative, as {self.before} is")
        require(0 <= self.tokens <= 100, f"tokens must be in [0, 100], not {self.tokens}")

    def rank(self, candidates: Candidates) -> Tensor:
        importance = candidates.importance
        page = min(self.page, candidates.block)
        pages = importance.view(importance.shape[0], -1, page)
        if self.score == "hhi":
            # Importances of 1e-6 square to denormals; the order is what matters.
            worth = (pages * importance.shape[-1]).square().sum(-1)
        else:
            worth = pages.sum(-1) if self.score == "mass" else pages.amax(-1)
        reached = worth
        for far in range(1, min(self.after, worth.shape[1] - 1) + 1):
            reached = torch.maximum(reached, F.pad(worth, (far, 0))[:, :-far] / 2**far)
        for far in range(1, min(self.before, worth.shape[1] - 1) + 1):
            reached = torch.maximum(reached, F.pad(worth, (0, far))[:, far:] / 2**far)
        return reached.repeat_interleave(page, dim=1)

    def choose(
        self, candidates: Candidates, level_counts: NDArray[np.int64], kept: NDArray[np.int64]
    ) -> Tensor:
        if not self.tokens:
            return super().choose(candidates, level_counts, kept)
        single = (kept * (self.tokens / 100)).astype(np.int64)
        certain = keep_best(candidates.importance, single)
        return keep_best(self.rank(candidates).masked_fill(certain, torch.inf), kept)
