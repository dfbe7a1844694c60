"""Storage of keys and values, one slot at a time."""

from __future__ import annotations

import torch
from torch import Tensor


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
            torch.empty(size, dtype=dtype, pin_memory=True)
            if in_host_memory
            else torch.empty(size, dtype=dtype, device=device)
        )
        self.kv[0] = 0
        self.importance = torch.zeros(num_slots, dtype=torch.bfloat16, device=device)
        self.capacity = num_slots - 1
        # Ascending on top of the stack, so that a fresh pool hands out contiguous runs.
        self._stack = torch.arange(num_slots - 1, 0, -1, dtype=torch.int32, device=device)
        self._height = self.capacity

    @property
    def num_free(self) -> int:
        return self._height

    def allocate(self, count: int) -> Tensor:
        """Take ``count`` slots: int32 ``[count]``."""
        if count > self._height:
            raise OutOfSlotsError(f"{count} slots wanted, {self._height} free of {self.capacity}")
        self._height -= count
        slots = self._stack[self._height : self._height + count].flip(0)
        self.importance[slots] = 0
        return slots

    def free(self, slots: Tensor) -> None:
        """Give slots back (any shape)."""
        flat = slots.reshape(-1)
        top = self._height + flat.numel()
        if top > self.capacity:
            raise RuntimeError(f"slots freed twice: {top} free of {self.capacity}")
        # Reversed, so that allocating the same slots again yields them in the same order.
        self._stack[self._height : top] = flat.flip(0)
        self._height = top

    def free_slots(self) -> Tensor:
        """The free slots themselves, for integrity checks."""
        return self._stack[: self._height]
