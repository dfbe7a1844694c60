"""Which entries of a request's slot lists may be dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_runtime.cache.head_slots import HeadSlots


@dataclass(frozen=True, eq=False)
class Run:
    """Whole blocks of complete rows: ``count`` consecutive tokens from ``position`` on.

    ``offsets`` (int64 ``[rows]``) is where they begin in each row's list.
    """

    position: int
    count: int
    offsets: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """A request's lists as selection sees them: candidates, and entries that always stay.

    Pruned stretches stay as they are; candidates are blocks, aligned to absolute positions, that
    every row holds completely. So their number is the same in all rows and known on the host.

    Attributes
    ----------
    lengths : int64 ``[rows]``, entries per list
    runs : the candidates, in order
    """

    lengths: NDArray[np.int64]
    runs: tuple[Run, ...]

    @staticmethod
    def of(parts: Sequence[HeadSlots], limit: int, block: int) -> Layout:
        """Lay out consecutive runs of tokens; only positions before ``limit`` are candidates."""
        before = np.zeros_like(parts[0].lengths)
        runs: list[Run] = []
        spans: list[tuple[int, int, NDArray[np.int64]]] = []
        for part in parts:
            if part.is_full:
                if spans and spans[-1][1] == part.begin:
                    begin, _, offsets = spans.pop()
                    spans.append((begin, part.end, offsets))
                else:
                    spans.append((part.begin, part.end, before.copy()))
            before = before + part.lengths
        for begin, end, offsets in spans:
            first = -(-begin // block) * block
            last = min(end, limit) // block * block
            if last > first:
                runs.append(Run(first, last - first, offsets + (first - begin)))
        return Layout(before, tuple(runs))

    @property
    def num_candidates(self) -> int:
        """Candidates per row."""
        return sum(run.count for run in self.runs)

    def entries(self, rows: slice, device: torch.device) -> Tensor:
        """List entry of every candidate: int64 ``[rows, num_candidates]``."""
        pieces = [
            torch.from_numpy(run.offsets[rows]).to(device)[:, None]
            + torch.arange(run.count, device=device)
            for run in self.runs
        ]
        return torch.cat(pieces, dim=1)
