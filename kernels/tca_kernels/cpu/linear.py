"""Projections of a few rows on the CPU, at the speed of memory.

A decode step multiplies every weight with one row per request, so reading the weights is all that
takes time. General matrix products leave a third of the bandwidth unused at such shapes, and slow
down again between two and thirty rows; these kernels read each weight once, in order, and reuse it
for all rows while it is in the first cache level.

Rows are always computed two at a time, a last odd one together with itself. So every row sees the
same arithmetic in the same order: what else is in the batch does not change a bit of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from tca_kernels.cpu.jit import helper, jit

LinearKernel = Callable[..., None]


@functools.cache
def linear_kernel() -> LinearKernel:
    """Compile, or load from numba's cache, ``out = x @ weight.T`` for few rows.

    The kernel's arguments:

    x : float32 ``[M, K]``
    weight : float32 ``[N, K]``
    out : float32 ``[M, N]``
    add : whether the product is added to ``out`` instead of stored
    parts : ranges of outputs that run in parallel
    """

    @jit(signature="void(f4[:,::1], f4[:,::1], f4[:,:], b1, i8)", parallel=True)
    def linear(x: Any, weight: Any, out: Any, add: Any, parts: Any) -> None:
        size = weight.shape[0]
        quads = size // 4
        for part in numba.prange(parts):
            for quad in range(quads * part // parts, quads * (part + 1) // parts):
                n = 4 * quad
                rows = weight[n : n + 4]
                for m in range(0, x.shape[0], 2):
                    _project(x, rows, out[:, n : n + 4], m, add)
        for n in range(4 * quads, size):
            for m in range(x.shape[0]):
                _project_one(x[m], weight[n], out[m, n : n + 1], add)

    kernel: LinearKernel = linear
    return kernel


@functools.cache
def gated_kernel() -> LinearKernel:
    """Compile, or load from numba's cache, ``silu(x @ gate.T) * (x @ up.T)`` for few rows.

    The kernel's arguments:

    x : float32 ``[M, K]``
    weight : float32 ``[2 I, K]``, rows of the gate first
    out : float32 ``[M, I]``, ``I`` even
    parts : ranges of outputs that run in parallel
    """

    @jit(signature="void(f4[:,::1], f4[:,::1], f4[:,::1], i8)", parallel=True)
    def gated(x: Any, weight: Any, out: Any, parts: Any) -> None:
        inner = out.shape[1]
        pairs = inner // 2
        for part in numba.prange(parts):
            for pair in range(pairs * part // parts, pairs * (part + 1) // parts):
                n = 2 * pair
                for m in range(0, x.shape[0], 2):
                    _project_gated(x, weight, inner, out, n, m)

    kernel: LinearKernel = gated
    return kernel


@helper
def _project(x: Any, rows: Any, out: Any, m: int, add: bool) -> None:
    """Four outputs of rows ``m`` and ``m + 1``."""
    other = min(m + 1, x.shape[0] - 1)
    a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    b0, b1, b2, b3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for k in range(x.shape[1]):
        a, b = x[m, k], x[other, k]
        w0, w1, w2, w3 = rows[0, k], rows[1, k], rows[2, k], rows[3, k]
        a0 += w0 * a
        a1 += w1 * a
        a2 += w2 * a
        a3 += w3 * a
        b0 += w0 * b
        b1 += w1 * b
        b2 += w2 * b
        b3 += w3 * b
    if add:
        out[m, 0] += a0
        out[m, 1] += a1
        out[m, 2] += a2
        out[m, 3] += a3
        if other > m:
            out[other, 0] += b0
            out[other, 1] += b1
            out[other, 2] += b2
            out[other, 3] += b3
    else:
        out[m, 0], out[m, 1], out[m, 2], out[m, 3] = a0, a1, a2, a3
        out[other, 0], out[other, 1], out[other, 2], out[other, 3] = b0, b1, b2, b3


@helper
def _project_one(x: Any, row: Any, out: Any, add: bool) -> None:
    total = np.float32(0)
    for k in range(x.shape[0]):
        total += x[k] * row[k]
    out[0] = out[0] + total if add else total


@helper
def _project_gated(x: Any, weight: Any, inner: int, out: Any, n: int, m: int) -> None:
    """Outputs ``n`` and ``n + 1`` of rows ``m`` and ``m + 1``."""
    other = min(m + 1, x.shape[0] - 1)
    a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    b0, b1, b2, b3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for k in range(x.shape[1]):
        a, b = x[m, k], x[other, k]
        w0, w1 = weight[n, k], weight[n + 1, k]
        w2, w3 = weight[inner + n, k], weight[inner + n + 1, k]
        a0 += w0 * a
        a1 += w1 * a
        a2 += w2 * a
        a3 += w3 * a
        b0 += w0 * b
        b1 += w1 * b
        b2 += w2 * b
        b3 += w3 * b
    out[m, n], out[m, n + 1] = _silu(a0) * a2, _silu(a1) * a3
    out[other, n], out[other, n + 1] = _silu(b0) * b2, _silu(b1) * b3


@helper
def _silu(x: Any) -> Any:
    return x / (np.float32(1) + np.exp(-x))
