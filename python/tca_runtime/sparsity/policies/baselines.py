"""Known policies, to compare with on the same cache at the same memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tca_runtime.sparsity.policies.base import Candidates, SelectionPolicy, require


@dataclass(frozen=True)
class FullPolicy(SelectionPolicy):
    """Everything is kept; for exact comparisons use it with a ratio of 1."""

    def rank(self, candidates: Candidates) -> Tensor:
        return torch.zeros_like(candidates.importance)


@dataclass(frozen=True)
class StreamingPolicy(SelectionPolicy):
    """Attention sinks and the most recent tokens (StreamingLLM, arXiv 2309.17453).

    Parameters
    ----------
    sinks : tokens at the start that are always kept
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        require(self.sinks >= 0, f"sinks must not be negative, as {self.sinks} is")

    def rank(self, candidates: Candidates) -> Tensor:
        importance = candidates.importance
        recency = torch.arange(importance.shape[-1], device=importance.device, dtype=torch.float32)
        recency[: self.sinks] += importance.shape[-1]
        return recency.expand_as(importance)


@dataclass(frozen=True)
class SnapKVPolicy(SelectionPolicy):
    """Importance to the latest queries, smoothed over neighbours (SnapKV, arXiv 2404.14469).

    Parameters
    ----------
    kernel : width of the average pooling over positions, odd
    """

    kernel: int = 5

    def __post_init__(self) -> None:
        odd = self.kernel > 0 and self.kernel % 2 == 1
        require(odd, f"kernel must be a positive odd number, not {self.kernel}")

    def rank(self, candidates: Candidates) -> Tensor:
        importance = candidates.importance[:, None]
        padding = self.kernel // 2
        return F.avg_pool1d(importance, self.kernel, stride=1, padding=padding)[:, 0]


@dataclass(frozen=True)
class KeyDiffPolicy(SelectionPolicy):
    """Keys unlike the others are kept, whatever the question (KeyDiff, arXiv 2504.15364).

    The worth of a key is minus its cosine similarity to the mean direction of all keys.
    """

    def rank(self, candidates: Candidates) -> Tensor:
        keys = F.normalize(candidates.keys.float(), dim=-1)
        anchor = keys.mean(dim=1, keepdim=True)
        return -F.cosine_similarity(keys, anchor, dim=-1)


@dataclass(frozen=True)
class ExpectedAttentionPolicy(SelectionPolicy):
    r"""Attention expected of future queries (Expected Attention, arXiv 2510.00636).

    Queries are taken as Gaussian with the probes' mean and covariance, so the expected weight of
    key k is :math:`\exp(\mu^T k / \sqrt d + k^T \Sigma k / 2 d)`; it is scaled by the value's norm.
    Unlike the paper, the statistics are of rotated queries, so no average rotation is needed.

    Parameters
    ----------
    use_covariance : include the second term
    epsilon : added to the expected weight before scaling
    """

    use_covariance: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        finite = 0 <= self.epsilon < math.inf
        require(finite, f"epsilon must not be negative or infinite, as {self.epsilon} is")

    def rank(self, candidates: Candidates) -> Tensor:
        keys, scale = candidates.keys.float(), candidates.scale
        heads, _, dim = keys.shape
        group = candidates.probes.shape[1] // heads
        queries = candidates.probes.float().view(-1, heads, group, dim).permute(1, 2, 0, 3)
        mean = queries.mean(dim=2)
        logits = torch.einsum("hgd,hnd->hgn", mean, keys) * scale
        if self.use_covariance:
            centred = queries - mean[:, :, None]
            spread = torch.einsum("hgpd,hnd->hgpn", centred, keys)
            logits = logits + spread.square().mean(dim=2) * (scale * scale / 2)
        weight = logits.softmax(dim=-1).mean(dim=1)
        worth: Tensor = (weight + self.epsilon) * candidates.values.float().norm(dim=-1)
        return worth
