"""Copies between tiers that are as late as their rules allow."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tca_kernels.move import move_rows
from tca_runtime.cache.transfer import Event, Transfers


class LateTransfers(Transfers):
    """Nothing is copied before somebody waits for it, or ``proceed`` is called.

    What a side stream does on a GPU at its slowest: a copy reads and writes slots long after it
    was asked for, so whoever frees, writes or reads them too early is found out.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self._queue: list[Callable[[], None]] = []
        self._done = 0

    def proceed(self, count: int) -> None:
        """Carry out the next ``count`` copies, as many as there are."""
        self._finish(min(self._done + count, len(self._queue)))

    def _copy(self, source: Tensor, slots: Tensor, target: Tensor, target_slots: Tensor) -> Event:
        self._queue.append(lambda: move_rows(source, slots, target, target_slots))
        return _LateEvent(self, len(self._queue))

    def _finish(self, until: int) -> None:
        for copy in self._queue[self._done : until]:
            copy()
        self._done = max(self._done, until)


class _LateEvent:
    def __init__(self, transfers: LateTransfers, number: int) -> None:
        self._transfers = transfers
        self._number = number

    def query(self) -> bool:
        return self._transfers._done >= self._number

    def wait(self) -> None:
        self._transfers._finish(self._number)
