"""Confidence intervals of what few samples can say."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
Z95 = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + Z95**2 / trials
    middle = (share + Z95**2 / (2 * trials)) / scale
    half = Z95 / scale * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_mean(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``[n]`` independent values."""
    means = _resampled(len(values), seed, values)[0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_ratio(
    values: NDArray[np.float64], base: NDArray[np.float64], seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of ``mean(values) / mean(base)``, paired: both ``[n]``."""
    mine, theirs = _resampled(len(values), seed, values, base)
    low, high = np.quantile(mine / np.maximum(theirs, 1e-12), [0.025, 0.975])
    return float(low), float(high)


def _resampled(count: int, seed: int, *columns: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    rows = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    return [column[rows].mean(axis=1) for column in columns]
