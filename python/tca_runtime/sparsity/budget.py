"""How many tokens each head keeps: log-Gaussian configurations (TCA-Attention, section 3.2).

A head's candidates are split into blocks of ``b`` tokens. A configuration says which share of the
blocks keeps 1, 2, 4, ... or all ``b`` tokens; the counts follow from the number of blocks alone,
so the host knows every length without reading the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# A ratio is reached by moving mu with sigma fixed to this, unless a calibration chose otherwise.
DEFAULT_SIGMA = 2.0
# Bounds of mu in a search; beyond them a distribution sits on one level.
MU_RANGE = (-40.0, 60.0)


def levels(block: int) -> NDArray[np.int64]:
    """Tokens a block can keep: 1, 2, 4, ..., ``block``."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"the block size must be a power of two, not {block}")
    return 2 ** np.arange(block.bit_length())


def proportions(
    mu: NDArray[np.float64], sigma: NDArray[np.float64], block: int
) -> NDArray[np.float64]:
    """Share of blocks at each level, ``p_k ~ exp(-(log2 k - mu)^2 / (2 sigma^2))``.

    Shapes: ``[...]`` and ``[...]`` give ``[..., K]``.
    """
    exponent = np.log2(levels(block))
    energy = -((exponent - mu[..., None]) ** 2) / (2.0 * sigma[..., None] ** 2)
    weight = np.exp(energy - energy.max(axis=-1, keepdims=True))
    return np.asarray(weight / weight.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, eq=False)
class BudgetTable:
    """One configuration per (layer, KV head).

    Tables are ordered by ``shifted``: a larger shift keeps a superset in every head, because each
    block's level is monotone in mu.

    Attributes
    ----------
    mu, sigma : float64 ``[L, Hkv]``; ``mu = inf`` keeps everything
    block : tokens per block
    """

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    block: int

    @staticmethod
    def uniform(ratio: float, num_layers: int, num_kv_heads: int, block: int = 64) -> BudgetTable:
        """The same ``ratio`` of kept tokens for every head.

        Raises
        ------
        ValueError
            For a ratio that no configuration reaches: below ``1 / block`` or above 1.
        """
        shape = (num_layers, num_kv_heads)
        return BudgetTable(np.zeros(shape), np.full(shape, DEFAULT_SIGMA), block).at_ratio(ratio)

    @property
    def keep_ratio(self) -> NDArray[np.float64]:
        """Share of candidates each head keeps in the limit of many blocks: ``[L, Hkv]``."""
        return np.asarray(self._proportions() @ levels(self.block) / self.block)

    @lru_cache(maxsize=256)  # noqa: B019 - as below; asked for at every request
    def average(self) -> float:
        """The mean of ``keep_ratio``."""
        return float(self.keep_ratio.mean())

    def shifted(self, delta: float) -> BudgetTable:
        """Every mu moved by ``delta``."""
        return replace(self, mu=self.mu + delta)

    @lru_cache(maxsize=256)  # noqa: B019 - as below; requests that want the same share it
    def at_ratio(self, ratio: float) -> BudgetTable:
        """The shift of this table whose average keep ratio is ``ratio``."""
        if not 1 / self.block <= ratio <= 1:
            raise ValueError(f"a kept ratio lies in [1/{self.block}, 1], not {ratio}")
        if ratio == 1:
            return replace(self, mu=np.full_like(self.mu, np.inf))
        finite = replace(self, mu=np.where(np.isinf(self.mu), MU_RANGE[1], self.mu))
        low, high = MU_RANGE[0] - finite.mu.max(), MU_RANGE[1] - finite.mu.min()
        for _ in range(60):
            middle = (low + high) / 2
            if finite.shifted(middle).keep_ratio.mean() < ratio:
                low = middle
            else:
                high = middle
        return finite.shifted(high)

    @lru_cache(maxsize=4096)  # noqa: B019 - tables live as long as the server
    def level_counts(self, num_blocks: int) -> NDArray[np.int64]:
        """How many blocks keep 1, 2, 4, ... tokens: int64 ``[L, Hkv, K]``, summing to the blocks.

        Cumulative rounding: the k-th count never depends on later levels, and tables that are
        nested in mu give nested counts.
        """
        edges = np.rint(np.cumsum(self._proportions(), axis=-1) * num_blocks).astype(np.int64)
        edges[..., -1] = num_blocks
        return np.diff(edges, axis=-1, prepend=0)

    def kept_tokens(self, num_blocks: int) -> NDArray[np.int64]:
        """Tokens each head keeps of ``num_blocks`` whole blocks: int64 ``[L, Hkv]``."""
        return np.asarray(self.level_counts(num_blocks) @ levels(self.block))

    def _proportions(self) -> NDArray[np.float64]:
        finite = np.minimum(self.mu, MU_RANGE[1] + 1)
        shares = proportions(finite, self.sigma, self.block)
        everything = np.zeros(shares.shape[-1])
        everything[-1] = 1.0
        return np.where(np.isinf(self.mu)[..., None], everything, shares)
