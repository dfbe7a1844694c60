"""What decides which candidates a head keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The droppable tokens of one layer of one request: whole blocks, the same in every head.

    Attributes
    ----------
    importance : float32 ``[Hkv, n]``, mean over probes and group heads of the softmax over
        everything the probes see (window included in the denominator)
    keys, values : ``[Hkv, n, D]``, gathered lazily by the policies that look at them
    probes : ``[P, Hq, D]``, the latest queries, after RoPE
    block : tokens per block; ``n`` is a multiple
    scale : of the attention logits
    """

    importance: Tensor
    probes: Tensor
    block: int
    scale: float
    pool: Tensor
    slots: Tensor

    @property
    def keys(self) -> Tensor:
        return self.pool[self.slots, 0]

    @property
    def values(self) -> Tensor:
        return self.pool[self.slots, 1]


class SelectionPolicy(ABC):
    """Ranks candidates. One dataclass per method; its fields are the method's parameters.

    How many tokens a head keeps is the budget's business, so every policy is compared at equal
    memory. Subclasses implement ``rank``; a policy that decides block by block overrides
    ``choose``.
    """

    @abstractmethod
    def rank(self, candidates: Candidates) -> Tensor:
        """Worth of each candidate, higher is kept first: float32 ``[Hkv, n]``."""

    def choose(
        self, candidates: Candidates, level_counts: NDArray[np.int64], kept: NDArray[np.int64]
    ) -> Tensor:
        """Pick the tokens to keep.

        Parameters
        ----------
        level_counts : int64 ``[Hkv, K]``, blocks per level (``BudgetTable.level_counts``)
        kept : int64 ``[Hkv]``, tokens per head

        Returns
        -------
        bool ``[Hkv, n]`` with exactly ``kept[h]`` True in row h; ties go to the earlier token.
        """
        return keep_best(self.rank(candidates), kept)


def require(condition: bool, text: str) -> None:
    """Refuse a policy's parameter.

    Raises
    ------
    ValueError
        With ``text`` unless the condition holds.
    """
    if not condition:
        raise ValueError(text)


def require_page(page: int) -> None:
    """Refuse a page that blocks do not consist of."""
    require(page > 0 and page & (page - 1) == 0, f"page must be a power of two, not {page}")


def keep_best(worth: Tensor, kept: NDArray[np.int64]) -> Tensor:
    """Mask of the ``kept[h]`` best entries of each row."""
    order = torch.argsort(worth, dim=-1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(-1, order, torch.arange(worth.shape[-1], device=worth.device).expand_as(order))
    return place < torch.from_numpy(kept).to(worth.device)[:, None]
