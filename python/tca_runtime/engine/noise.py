"""Gumbel noise as a pure function of (seed, position, token id).

A row's draw never depends on its neighbours in the batch, on its place in it, or on how many
draws came before. Gumbel-max is preferred to inverting the cumulative distribution because it is
stable: rounding differences of the logits (batch shape, kernel choice) only matter when two
tokens nearly tie, while they shift every later boundary of a cumulative sum.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX64_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX64_B = np.uint64(0x94D049BB133111EB)
_MIX32_A = 0x7FEB352D
_MIX32_B = 0x846CA68B - 2**32
# The largest float32 below 2**-31: maps 31 random bits into the open interval (0, 1).
_UNIT = float(2.0**-31 * (1 - 2.0**-24))


def noise_keys(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Hash each row's seed and the position of its next token: ``[N]`` to ``[N, 2]``."""
    keys = _mix64(_mix64(seeds) + positions * _GOLDEN)
    return keys.view(np.int32).reshape(-1, 2)


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token of every row.

    Parameters
    ----------
    keys : int32 ``[N, 2]``, from `noise_keys`

    Returns
    -------
    float32 ``[N, vocab_size]``, all finite
    """
    bits = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) + keys[:, :1]
    _xor_shift(bits, 16).mul_(_MIX32_A)
    _xor_shift(bits, 15).add_(keys[:, 1:]).mul_(_MIX32_B)
    _xor_shift(bits, 16).bitwise_and_(0x7FFFFFFF)
    # log1p keeps the full resolution of small uniforms, which make the large noise values.
    exponential = bits.float().add_(0.5).mul_(-_UNIT).log1p_().neg_()
    return exponential.log_().neg_()


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX64_A
    x = (x ^ (x >> np.uint64(27))) * _MIX64_B
    return x ^ (x >> np.uint64(31))


def _xor_shift(x: Tensor, by: int) -> Tensor:
    # torch shifts int32 arithmetically: the mask makes it logical.
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (32 - by)) - 1))
