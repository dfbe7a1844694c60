"""Policies of methods that retrieve or evict while decoding, as far as a view can express them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_runtime.sparsity.policies.base import (
    Candidates,
    SelectionPolicy,
    keep_best,
    require,
    require_page,
)


@dataclass(frozen=True)
class TopKPolicy(SelectionPolicy):
    """The tokens of most attention from the probes, whatever block they are in.

    With 128 probes this is the vertical pattern of FlexPrefill (arXiv 2502.20766), which takes a
    prompt's last 128 queries as representatives; its slash pattern and its budget by cumulative
    attention have no counterpart here.
    """

    def rank(self, candidates: Candidates) -> Tensor:
        return candidates.importance


@dataclass(frozen=True)
class QuestPolicy(SelectionPolicy):
    r"""Whole pages whose keys could score highest (Quest, arXiv 2406.10774).

    A page's bound for query q is :math:`\sum_d \max(q_d m_d, q_d M_d)`, m and M the smallest and
    largest key of the page in each channel. Unlike the paper, which selects before every decode
    step and keeps everything in memory, pages are chosen once per view, by the latest queries.

    Parameters
    ----------
    page : tokens per page, a power of two
    queries : latest probes whose bounds are averaged
    """

    page: int = 16
    queries: int = 1

    def __post_init__(self) -> None:
        require_page(self.page)
        require(self.queries > 0, f"queries must be positive, not {self.queries}")

    def rank(self, candidates: Candidates) -> Tensor:
        keys = candidates.keys.float()
        heads, count, dim = keys.shape
        page = min(self.page, candidates.block)
        pages = keys.view(heads, count // page, page, dim)
        low, high = pages.amin(2), pages.amax(2)
        probes = candidates.probes[-self.queries :].float()
        queries = probes.view(len(probes), heads, -1, dim)
        # max(q m, q M) per channel: M where q is positive, m where it is negative.
        bounds = torch.einsum("phgd,hnd->hn", queries.clamp_min(0), high)
        bounds += torch.einsum("phgd,hnd->hn", queries.clamp_max(0), low)
        return bounds.repeat_interleave(page, dim=1)


@dataclass(frozen=True)
class H2OPolicy(SelectionPolicy):
    """Heavy hitters by accumulated attention, and the most recent tokens (H2O, arXiv 2306.14048).

    Attention is accumulated over the probes, so the more of them there are, the closer this is
    to the paper's sum over all queries.

    Parameters
    ----------
    recent : share of the budget that goes to the most recent candidates
    """

    recent: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.recent <= 1, f"recent must be in [0, 1], not {self.recent}")

    def rank(self, candidates: Candidates) -> Tensor:
        return candidates.importance

    def choose(
        self, candidates: Candidates, level_counts: NDArray[np.int64], kept: NDArray[np.int64]
    ) -> Tensor:
        worth = self.rank(candidates)
        count = worth.shape[-1]
        recent = torch.from_numpy((kept * self.recent).astype(np.int64)).to(worth.device)
        latest = torch.arange(count, device=worth.device) >= count - recent[:, None]
        return keep_best(worth.masked_fill(latest, torch.inf), kept)
