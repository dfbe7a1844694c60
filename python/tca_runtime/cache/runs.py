"""Working on many things at once, but not on more than fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def bounded(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Runs of things whose sizes add up to ``most`` at most, but of one thing at least."""
    begin, total = 0, 0
    for place, size in enumerate(sizes):
        if place > begin and total + size > most:
            yield slice(begin, place)
            begin, total = place, 0
        total += size
    if begin < len(sizes):
        yield slice(begin, len(sizes))


def even_cuts(begin: int, end: int, longest: int) -> list[int]:
    """Bounds of the pieces: as few as may be that long, all about equally long."""
    count = -(-(end - begin) // longest)
    return [begin + (end - begin) * i // count for i in range(count + 1)]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
