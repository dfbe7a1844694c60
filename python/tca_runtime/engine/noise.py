"""What Gumbel noise is made from: a pure function of (seed, position, token id).

A row's draw never depends on its neighbours in the batch, on its place in it, or on how many
draws came before. Gumbel-max is preferred to inverting the cumulative distribution because it is
stable: rounding differences of the logits (batch shape, kernel choice) only matter when two
tokens nearly tie, while they shift every later boundary of a cumulative sum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX64_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX64_B = np.uint64(0x94D049BB133111EB)


def noise_keys(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Hash each row's seed and the position of its next token: ``[N]`` to ``[N, 2]``."""
    keys = _mix64(_mix64(seeds) + positions * _GOLDEN)
    return keys.view(np.int32).reshape(-1, 2)


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX64_A
    x = (x ^ (x >> np.uint64(27))) * _MIX64_B
    return x ^ (x >> np.uint64(31))
