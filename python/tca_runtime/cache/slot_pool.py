"""Storage of keys and values, one slot at a time."""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor

from tca_runtime.cache.transfer import Event


class OutOfSlotsError(RuntimeError):
    """More slots were asked for than are free. The caller evicts first, so this is a bug."""


class SlotPool:
    """A fixed number of slots, each holding K and V of one token for one KV head of one layer.

    The free list is a stack in device memory with its height on the host: allocating and freeing
    are device copies whose sizes the host knows, so neither waits for the device.

    Parameters
    ----------
    num_slots : capacity; slot 0 is never handed out (padding of captured graphs points to it)
    head_dim : elements of one key or value vector
    dtype, device : of the storage
    in_host_memory : K and V in pinned memory that the device reads and writes itself

    Attributes
    ----------
    kv : ``[num_slots, 2, head_dim]``; index 0 on axis 1 is the key, 1 the value
    importance : bfloat16 ``[num_slots]``, the best importance that any selection gave the slot
        since it was allocated; what pruning ranks by
    """

    def __init__(
        self,
        num_slots: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        in_host_memory: bool = False,
    ) -> None:
        size = (num_slots, 2, head_dim)
        # Not cleared: a slot is written before it is read, and untouched pages cost nothing.
        self.kv = (
            _page_locked(size, dtype)
            if in_host_memory
            else torch.empty(size, dtype=dtype, device=device)
        )
        self.kv[0] = 0
        self.importance = torch.zeros(num_slots, dtype=torch.bfloat16, device=device)
        self.capacity = num_slots - 1
        # Ascending on top of the stack, so that a fresh pool hands out contiguous runs.
        self._stack = torch.arange(num_slots - 1, 0, -1, dtype=torch.int32, device=device)
        self._height = self.capacity
        # Free, but a copy still reads or writes them; the oldest copy is first.
        self._leaving: deque[tuple[Event, Tensor]] = deque()
        self._num_leaving = 0

    @property
    def num_free(self) -> int:
        return self._height + self._num_leaving

    def allocate(self, count: int) -> Tensor:
        """Take ``count`` slots: int32 ``[count]``. The stream waits for copies only if it must."""
        if count > self.num_free:
            raise OutOfSlotsError(f"{count} slots wanted, {self.num_free} free of {self.capacity}")
        self._settle(count)
        self._height -= count
        slots = self._stack[self._height : self._height + count].flip(0)
        # Assigning a number through an index would make the host wait for the device.
        self.importance.index_fill_(0, slots.long(), 0)
        return slots

    def free(self, slots: Tensor, after: Event | None = None) -> None:
        """Give slots back (any shape); ``after``: a copy that they still take part in."""
        flat = slots.reshape(-1)
        if self.num_free + flat.numel() > self.capacity:
            total = self.num_free + flat.numel()
            raise RuntimeError(f"slots freed twice: {total} free of {self.capacity}")
        if after is not None:
            self._leaving.append((after, flat))
            self._num_leaving += flat.numel()
            return
        top = self._height + flat.numel()
        # Reversed, so that allocating the same slots again yields them in the same order.
        self._stack[self._height : top] = flat.flip(0)
        self._height = top

    def free_slots(self) -> Tensor:
        """The free slots themselves, for integrity checks."""
        return torch.cat([self._stack[: self._height], *(slots for _, slots in self._leaving)])

    def _settle(self, wanted: int) -> None:
        """Take back what copies are done with, and wait for more until ``wanted`` are there."""
        while self._leaving and (self._height < wanted or self._leaving[0][0].query()):
            event, slots = self._leaving.popleft()
            event.wait()
            self._num_leaving -= slots.numel()
            self.free(slots)


def _page_locked(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Host memory that the device reads and writes itself.

    torch's own pinned memory is rounded up to a power of two, which may be twice as much.
    """
    kv = torch.empty(size, dtype=dtype)
    runtime = torch.cuda.cudart()
    if status := int(runtime.cudaHostRegister(kv.data_ptr(), kv.nbytes, 0)):
        raise RuntimeError(f"cannot lock {kv.nbytes} bytes of host memory: CUDA error {status}")
    weakref.finalize(kv, runtime.cudaHostUnregister, kv.data_ptr())
    return kv
