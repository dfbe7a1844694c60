"""Huge pages for the slot pool: lists jump through it, and every jump needs an address lookup."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

HUGE_PAGE = 2 << 20


def advise_huge_pages(tensor: Tensor) -> bool:
    """Ask the kernel to back a CPU tensor's memory by huge pages, before it is first touched.

    Contents stay as they are. Returns whether the advice was taken: False on systems without
    huge pages, and for tensors that hold no whole one.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if advice is None or begin >= end:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return bool(madvise(begin, end - begin, advice) == 0)
