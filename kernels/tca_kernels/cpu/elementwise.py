"""Norms and rotary positions on the CPU, each in one pass over memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from tca_kernels.cpu.jit import jit

ElementwiseKernel = Callable[..., None]


@functools.cache
def rms_norm_kernel() -> ElementwiseKernel:
    """Compile, or load from numba's cache, the root-mean-square norm of rows.

    The kernel's arguments:

    x, out : float32 ``[T, N]``, contiguous
    weight : float32 ``[N]``
    eps : added to the mean square
    parts : ranges of rows that run in parallel
    """

    @jit(signature="void(f4[:,::1], f4[::1], f8, f4[:,::1], i8)", parallel=True)
    def rms_norm(x: Any, weight: Any, eps: Any, out: Any, parts: Any) -> None:
        count, size = x.shape
        for part in numba.prange(parts):
            for t in range(count * part // parts, count * (part + 1) // parts):
                total = np.float32(0)
                for n in range(size):
                    total += x[t, n] * x[t, n]
                factor = np.float32(1 / np.sqrt(total / size + eps))
                for n in range(size):
                    out[t, n] = x[t, n] * factor * weight[n]

    kernel: ElementwiseKernel = rms_norm
    return kernel


@functools.cache
def rotate_kernel() -> ElementwiseKernel:
    """Compile, or load from numba's cache, the in-place rotation of heads.

    The kernel's arguments:

    heads : float32 ``[T, H, D]``
    cos, sin : float32 ``[T, D]``, the first half of ``sin`` negated
    parts : ranges of tokens that run in parallel
    """

    @jit(signature="void(f4[:,:,:], f4[:,:], f4[:,:], i8)", parallel=True)
    def rotate(heads: Any, cos: Any, sin: Any, parts: Any) -> None:
        count, num_heads, size = heads.shape
        half = size // 2
        for part in numba.prange(parts):
            for t in range(count * part // parts, count * (part + 1) // parts):
                for h in range(num_heads):
                    for d in range(half):
                        low, high = heads[t, h, d], heads[t, h, d + half]
                        heads[t, h, d] = low * cos[t, d] + high * sin[t, d]
                        heads[t, h, d + half] = high * cos[t, d + half] + low * sin[t, d + half]

    kernel: ElementwiseKernel = rotate
    return kernel
