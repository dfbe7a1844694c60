"""The configurations that calibration chooses from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tca_runtime.sparsity.budget import BudgetTable

# Wider shapes need means beyond ``budget.MU_RANGE``.
SIGMAS = (1.0, 2.0, 3.0, 4.0)
NUM_RATIOS = 25
# The cheapest, in tokens per block: a little more than the one token that every block keeps.
LEAST_TOKENS = 1.28
HIGHEST_RATIO = 0.9
# Of "everything": so far above the largest level that no block is left at a smaller one, yet near
# enough that the budgets of a request with its own ratio can come down from it.
EVERYTHING_ABOVE = 6.0
EVERYTHING_SIGMA = 0.5


@dataclass(frozen=True, eq=False)
class Grid:
    """Candidate configurations, cheapest first; the last one keeps everything.

    Attributes
    ----------
    mu, sigma : float64 ``[M]``
    ratio : float64 ``[M]``, share of candidates kept in the limit of many blocks
    block : tokens per block
    """

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    ratio: NDArray[np.float64]
    block: int

    @staticmethod
    def build(block: int) -> Grid:
        """Keep ratios in equal steps of their logarithm, each in every shape, and everything."""
        mu, sigma, ratio = [], [], []
        for target in np.geomspace(LEAST_TOKENS / block, HIGHEST_RATIO, NUM_RATIOS).tolist():
            for width in SIGMAS:
                table = BudgetTable(np.zeros((1, 1)), np.full((1, 1), width), block)
                mu.append(float(table.at_ratio(target).mu[0, 0]))
                sigma.append(width)
                ratio.append(target)
        mu.append(float(np.log2(block)) + EVERYTHING_ABOVE)
        sigma.append(EVERYTHING_SIGMA)
        ratio.append(1.0)
        return Grid(np.array(mu), np.array(sigma), np.array(ratio), block)

    @property
    def size(self) -> int:
        return len(self.mu)

    def first_ranks(self, num_blocks: int) -> NDArray[np.int64]:
        """Where levels begin: int64 ``[K, M]``.

        With blocks sorted by score, those from rank ``first_ranks[k, m]`` on keep at least the
        k-th level's tokens under configuration ``m``.
        """
        table = BudgetTable(self.mu[:, None], self.sigma[:, None], self.block)
        counts = table.level_counts(num_blocks)[:, 0]
        return np.asarray((counts.cumsum(axis=-1) - counts).T)
