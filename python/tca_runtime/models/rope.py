"""Rotary position encoding: frequencies and the table of cos and sin."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tca_runtime.models.config import RopeConfig


class RotaryTable:
    """cos and sin of every position, looked up once per forward pass.

    Row ``p`` holds ``[cos | cos]`` and ``[-sin | sin]``, so that with the halves of a head swapped
    ``rotated = x * cos + swapped * sin``.
    """

    def __init__(
        self,
        rope: RopeConfig,
        head_dim: int,
        max_position: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        positions = torch.arange(max_position, dtype=torch.float32, device=device)
        frequencies = inverse_frequencies(rope, head_dim).to(device)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        rows = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
        self._rows = (rows * rope.attention_factor).to(dtype)

    def lookup(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin for int64 ``[T]`` positions, each ``[T, 1, D]``."""
        cos, sin = self._rows[positions].split(1, dim=1)
        return cos, sin


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each dimension pair, float32 ``[head_dim / 2]``."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.freq_divisors:
        return frequencies / torch.tensor(rope.freq_divisors, dtype=torch.float32)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, frequencies)
    if rope.type == "yarn":
        return _yarn(rope, head_dim)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long waves are stretched, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_max_position / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    stretched = torch.where(
        wavelengths > rope.original_max_position / low, frequencies / rope.factor, blended
    )
    return torch.where(wavelengths < rope.original_max_position / high, frequencies, stretched)


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """NTK-by-parts interpolation (arXiv 2309.00071, section 3.2)."""

    def dimension_of(rotations: float) -> float:
        waves = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    bases = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return 1.0 / (rope.factor * bases) * (1 - kept) + 1.0 / bases * kept
