"""Copies of slots between the tiers, beside the device's other work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from tca_kernels.move import move_rows
from tca_runtime.cache.head_slots import HeadSlots

if TYPE_CHECKING:
    from tca_runtime.cache.slot_pool import SlotPool

# Enough programs to keep the bus busy, few enough to leave the multiprocessors to the model.
COPY_PROGRAMS = 64


class Event(Protocol):
    """The end of some copies; ``torch.cuda.Event`` is one."""

    def query(self) -> bool:
        """Whether it is over."""
        ...

    def wait(self) -> None:
        """Have the current stream's later work start after it; the host goes on."""
        ...


class Transfers:
    """Moves slots between a pool on the device and one in host memory, first come, first served.

    Who asks for a copy keeps to three rules, so that nobody waits who need not:

    - K and V that were fetched are read only after ``wait_for(layer)``;
    - slots that take part in a copy are freed with ``after`` its event, see ``SlotPool.free``;
    - slots of the host pool may be freed at once: copies do not overtake each other.

    Here a copy is over before its call returns, as on a CPU. ``StreamTransfers`` runs them on a
    stream of their own.
    """

    def __init__(self, num_layers: int) -> None:
        self._arrivals: list[Event | None] = [None] * num_layers
        self._last: Event | None = None

    @property
    def pending(self) -> Event | None:
        """The end of everything that was asked for; None if nothing is under way."""
        if self._last is not None and self._last.query():
            self._last = None
        return self._last

    def send(
        self, source: SlotPool, slots: Tensor, target: SlotPool, target_slots: Tensor
    ) -> Event | None:
        """Copy K and V of some slots; returns when that will be over, None if it is."""
        self._begin([slots, target_slots])
        self._last = self._copy(source.kv, slots, target.kv, target_slots)
        target.importance[target_slots] = source.importance[slots]
        return self._last

    def fetch(
        self, source: SlotPool, target: SlotPool, lists: Sequence[tuple[HeadSlots, Tensor]]
    ) -> None:
        """Copy runs of tokens, all of them layer by layer, lowest layer first.

        ``lists``: of each run the slots in ``source``, and as many of ``target`` in their order.
        """
        layers = len(self._arrivals)
        bounds = [
            [0, *np.cumsum(run.lengths.reshape(layers, -1).sum(1)).tolist()] for run, _ in lists
        ]
        self._begin([tensor for run, slots in lists for tensor in (run.slots, slots)])
        for layer, parts in enumerate(zip(*map(pairwise, bounds), strict=True)):
            for (run, slots), (begin, end) in zip(lists, parts, strict=True):
                self._last = self._copy(
                    source.kv, run.slots[begin:end], target.kv, slots[begin:end]
                )
            self._arrivals[layer] = self._last
        for run, slots in lists:
            target.importance[slots] = source.importance[run.slots]

    def wait_for(self, layer: int) -> None:
        """Have the current stream wait until everything fetched of a layer is there."""
        arrival = self._arrivals[layer]
        if arrival is None:
            return
        # Also when it is over: that orders this stream's reads after the copy's writes.
        arrival.wait()
        if arrival.query():
            self._arrivals[layer] = None

    def _begin(self, lists: Sequence[Tensor]) -> None:
        """Let the next copies see all that the current stream has done; they use ``lists``."""

    def _copy(
        self, source: Tensor, slots: Tensor, target: Tensor, target_slots: Tensor
    ) -> Event | None:
        move_rows(source, slots, target, target_slots)
        return None


class StreamTransfers(Transfers):
    """Copies on a CUDA stream of their own."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        super().__init__(num_layers)
        self._stream = torch.cuda.Stream(device)

    def _begin(self, lists: Sequence[Tensor]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for tensor in lists:
            tensor.record_stream(self._stream)

    def _copy(
        self, source: Tensor, slots: Tensor, target: Tensor, target_slots: Tensor
    ) -> Event | None:
        with torch.cuda.stream(self._stream):
            move_rows(source, slots, target, target_slots, COPY_PROGRAMS)
            event = torch.cuda.Event()
            event.record()
        return event


def create_transfers(num_layers: int, device: torch.device) -> Transfers:
    return StreamTransfers(num_layers, device) if device.type == "cuda" else Transfers(num_layers)
