"""Stores a step's keys and values in the slot pool on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tca_kernels.cpu.jit import jit

WriteKernel = Callable[..., None]


@functools.cache
def write_kernel() -> WriteKernel:
    """Compile, or load from numba's cache, the kernel that scatters rows into slots.

    The kernel's arguments, all numpy arrays:

    kv : float32 ``[num_slots, 2, D]``
    slots : uint32 ``[T, Hkv]``
    keys, values : float32 ``[T, Hkv, D]``
    """

    @jit(signature="void(f4[:,:,::1], u4[:,:], f4[:,:,:], f4[:,:,:])")
    def write(kv: Any, slots: Any, keys: Any, values: Any) -> None:
        for t in range(slots.shape[0]):
            for h in range(slots.shape[1]):
                slot = slots[t, h]
                for d in range(kv.shape[2]):
                    kv[slot, 0, d] = keys[t, h, d]
                    kv[slot, 1, d] = values[t, h, d]

    kernel: WriteKernel = write
    return kernel
