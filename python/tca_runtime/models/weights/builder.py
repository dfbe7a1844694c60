"""Assembles a model's tensors from a source, each in its final place, dtype and layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tca_runtime.models.layers import Embedding, Linear
from tca_runtime.models.weights.source import WeightSource


class WeightBuilder:
    """Reads tensors one by one, so that beside the model at most one of them is in memory."""

    def __init__(self, source: WeightSource, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._source = source

    def embedding(self, name: str, vocab_size: int, size: int) -> Embedding:
        """The table of one vector per token."""
        tensor = self._source.read(f"{name}.weight", (vocab_size, size))
        # A copy in any case: the source may hand out a view of a mapped file.
        return Embedding(tensor.to(self.device, self.dtype, copy=True))

    def vector(self, names: Sequence[str], sizes: Sequence[int]) -> Tensor:
        """Vectors joined end to end."""
        target = self._empty(sum(sizes))
        for part, name, size in zip(target.split(list(sizes)), names, sizes, strict=True):
            part.copy_(self._source.read(name, (size,)))
        return target

    def linear(
        self, names: Sequence[str], out_sizes: Sequence[int], in_size: int, bias: bool = False
    ) -> Linear:
        """Projections of one input, joined along their outputs into one product."""
        rows = self._empty(sum(out_sizes), in_size)
        for part, name, size in zip(rows.split(list(out_sizes)), names, out_sizes, strict=True):
            part.copy_(self._source.read(f"{name}.weight", (size, in_size)))
        if not bias:
            return Linear(rows)
        return Linear(rows, self.vector([f"{name}.bias" for name in names], out_sizes))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)
