"""Means with intervals, and differences over the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean in points (percent) with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def bootstrap(values: Sequence[float], strata: Sequence[str], seed: int = 0) -> Estimate:
    """Mean of the strata's means; resamples within each, as the strata are a fixed set of tasks.

    Parameters
    ----------
    values : scores in [0, 1], or differences of scores
    strata : the task of each value
    """
    scores = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(np.asarray(strata) == name) for name in sorted(set(strata))]
    drawn = np.zeros(RESAMPLES)
    for group in groups:
        picks: NDArray[np.int64] = rng.choice(group, (RESAMPLES, len(group)))
        drawn += scores[picks].mean(axis=1) / len(groups)
    mean = float(np.mean([scores[group].mean() for group in groups]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(100 * mean, 100 * float(low), 100 * float(high))
