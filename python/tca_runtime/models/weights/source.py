"""Where tensors come from."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class WeightSource(Protocol):
    """A checkpoint whose tensors are read one at a time, under Hugging Face's names."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, in whatever dtype it is stored, on whatever device it can be read to.

        Raises
        ------
        ModelError
            If there is none of that name, it has another shape, or its file cannot be read.
        """
        ...
