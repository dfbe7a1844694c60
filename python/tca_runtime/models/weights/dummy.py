"""Random weights, made where they are needed."""

from __future__ import annotations

import torch
from torch import Tensor

# Hugging Face's initializer_range: keeps activations of any depth in range.
_STD = 0.02


class DummySource:
    """Normal weights and biases, unit norms; the same sequence for every run on a device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        return tensor.normal_(0.0, _STD, generator=self._generator)
