"""Which configuration each head gets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tca_runtime.calibration.grid import Grid

# Bounds of the price of one head's whole cache, in units of relative squared error.
PRICE_RANGE = (1e-12, 1e6)
# Of an average over heads.
ROUNDING = 1e-9


def cheapest(
    mass: NDArray[np.float64], grid: Grid, threshold: float, floor: float
) -> NDArray[np.int64]:
    """Algorithm 1: per head the cheapest configuration that retains ``threshold`` of the mass.

    Among equally cheap ones the one that retains most.

    Parameters
    ----------
    mass : ``[..., M]``, mean retained mass
    floor : least keep ratio

    Returns
    -------
    Index into the grid: int64 ``[...]``. The last configuration keeps all mass, so there is one.
    """
    allowed = (mass >= threshold) & (grid.ratio >= floor)
    allowed[..., -1] = True
    # Masses lie in [0, 1] and neighbouring ratios differ, so mass only decides between equals.
    steps = np.unique(grid.ratio, return_inverse=True)[1]
    return np.asarray(np.where(allowed, 2.0 * steps - mass, np.inf).argmin(axis=-1))


def least_error(
    error: NDArray[np.float64], grid: Grid, ratio: float, floor: float
) -> NDArray[np.int64]:
    r"""The configurations with the least summed error whose average keep ratio is ``ratio``.

    Minimises :math:`\sum_h e_h(c_h) + \lambda \sum_h r(c_h)` head by head and searches the price
    :math:`\lambda` of memory at which the budget is just met.

    Parameters
    ----------
    error : ``[..., M]``, mean error of the layer's output that each head's configuration causes
    floor : least keep ratio of every head

    Returns
    -------
    Index into the grid: int64 ``[...]``; on average at most ``ratio`` is kept.

    Raises
    ------
    ValueError
        When the floor alone exceeds the ratio.
    """
    allowed = grid.ratio >= floor
    limit = ratio + ROUNDING
    if grid.ratio[allowed].min() > limit:
        raise ValueError(
            f"no configuration keeps at least {floor:g} of every head and {ratio:g} on average"
        )
    cost = np.where(allowed, error, np.inf)

    def at_price(price: float) -> NDArray[np.int64]:
        return np.asarray((cost + price * grid.ratio).argmin(axis=-1))

    low, high = np.log(PRICE_RANGE)
    for _ in range(60):
        middle = (low + high) / 2
        if grid.ratio[at_price(np.exp(middle))].mean() > limit:
            low = middle
        else:
            high = middle
    return at_price(np.exp(high))
