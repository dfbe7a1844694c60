"""Decode attention over slot lists on the CPU: reads every slot in place, gathers nothing.

All lists of one layer form one long axis of slots, which is cut into equal ranges, one per thread,
wherever the cuts fall. A list that is cut leaves partial results, which are merged at the end by
their softmax weights. So threads stay balanced whatever the lengths of the lists are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from tca_kernels.cpu.jit import helper, jit

BLOCK = 32
"""Slots whose scores are computed before their values are added: their rows stay in L1."""

AHEAD = 8
"""How many slots ahead rows are prefetched; list neighbours can lie anywhere in the pool."""

MIN_RANGE = 256
"""Slots below which another thread costs more than it saves."""

CACHE_LINE = 16
"""Floats per cache line."""

LOG2_E = 1.4426950408889634

# Scores are finite so that arithmetic without infinities stays defined.
LOWEST = np.float32(-1e30)

DecodeKernel = Callable[..., None]


@functools.cache
def decode_kernel(head_dim: int) -> DecodeKernel:
    """Compile, or load from numba's cache, the kernel for one head size.

    The kernel's arguments, all numpy arrays or scalars:

    kv : float32 ``[num_slots, 2, head_dim]``
    arena : uint32 ``[A]``
    start, length : int64, int32 ``[B, L, Hkv]``; no list may be empty
    layer : which ``L``
    queries : float32 ``[>= B, Hkv * group, head_dim]``
    scale : of the scores, in natural units
    out : float32 ``[>= B, Hkv * group, head_dim]``
    values, weights : float32 workspaces ``[threads, 2, group, head_dim]`` and
        ``[threads, 2, 2, group]``
    """

    @jit(
        signature="void(f4[:,:,::1], u4[::1], i8[:,:,:], i4[:,:,:], i8, f4[:,:,:], f8,"
        " f4[:,:,:], f4[:,:,:,::1], f4[:,:,:,::1])",
        parallel=True,
    )
    def decode(
        kv: Any,
        arena: Any,
        start: Any,
        length: Any,
        layer: Any,
        queries: Any,
        scale: Any,
        out: Any,
        values: Any,
        weights: Any,
    ) -> None:
        total = 0
        for b in range(start.shape[0]):
            for h in range(start.shape[2]):
                total += length[b, layer, h]
        ranges = min(values.shape[0], 1 + total // MIN_RANGE)
        cut_lists = np.empty(ranges, np.int64)
        cut_ends = np.empty(ranges, np.int64)
        factor = np.float32(scale * LOG2_E)
        for r in numba.prange(ranges):
            low, high = total * r // ranges, total * (r + 1) // ranges
            cut_lists[r], cut_ends[r] = _attend_range(
                kv,
                arena,
                start[:, layer],
                length[:, layer],
                low,
                high,
                queries,
                factor,
                out,
                values[r],
                weights[r],
                head_dim,
            )
        for r in range(ranges):
            if cut_lists[r] >= 0:
                last = r + 1
                while last < ranges and total * last // ranges < cut_ends[r]:
                    last += 1
                _join(cut_lists[r], r, last, start.shape[2], values, weights, out, head_dim)

    kernel: DecodeKernel = decode
    return kernel


@helper
def _attend_range(
    kv: Any,
    arena: Any,
    start: Any,
    length: Any,
    low: int,
    high: int,
    queries: Any,
    factor: Any,
    out: Any,
    values: Any,
    weights: Any,
    head_dim: int,
) -> tuple[int, int]:
    """Attend over slots ``[low, high)`` of the long axis.

    Part 0 of the workspaces continues the list that the range before cut off. Part 1 serves all
    lists that begin here, of which only the last can be cut off in turn; returned are that list's
    number, or -1, and where it ends.
    """
    heads = start.shape[1]
    group = values.shape[1]
    query = np.empty((group, head_dim), np.float32)
    scores = np.empty((group, BLOCK), np.float32)
    begin = 0
    for item in range(start.size):
        b, h = item // heads, item % heads
        end = begin + length[b, h]
        first, last = max(low, begin), min(high, end)
        if first < last:
            part = 0 if begin < low else 1
            for g in range(group):
                weights[part, 0, g] = LOWEST
                weights[part, 1, g] = 0
                for d in range(head_dim):
                    query[g, d] = queries[b, h * group + g, d] * factor
                    values[part, g, d] = 0
            offset = start[b, h] - begin
            slots = arena[offset + first : offset + last]
            _attend(kv, slots, query, scores, values[part], weights[part], group, head_dim)
            if part == 1 and end > high:
                return item, end
            if part == 1:
                for g in range(group):
                    inverse = np.float32(1) / weights[1, 1, g]
                    for d in range(head_dim):
                        out[b, h * group + g, d] = values[1, g, d] * inverse
        begin = end
    return -1, 0


@helper
def _attend(
    kv: Any,
    slots: Any,
    query: Any,
    scores: Any,
    values: Any,
    weights: Any,
    group: int,
    head_dim: int,
) -> None:
    """Online softmax of one KV head's query heads over a run of slots; scores are base 2.

    ``weights``: per query head the running maximum score, and the sum of weights relative to it.
    """
    count = len(slots)
    for base in range(0, count, BLOCK):
        size = min(BLOCK, count - base)
        for j in range(size):
            key = kv[slots[base + j], 0]
            if base + j + AHEAD < count:
                _prefetch_slot(kv, slots[base + j + AHEAD], head_dim)
            for g in range(group):
                score = np.float32(0)
                for d in range(head_dim):
                    score += query[g, d] * key[d]
                scores[g, j] = score
        for g in range(group):
            _block_softmax(scores, size, values, weights, g, head_dim)
        # Four values at a time: each pass over the accumulator loads and stores it once.
        for j in range(0, size - 3, 4):
            v0, v1 = kv[slots[base + j], 1], kv[slots[base + j + 1], 1]
            v2, v3 = kv[slots[base + j + 2], 1], kv[slots[base + j + 3], 1]
            for g in range(group):
                p0, p1, p2, p3 = scores[g, j], scores[g, j + 1], scores[g, j + 2], scores[g, j + 3]
                for d in range(head_dim):
                    values[g, d] += (p0 * v0[d] + p1 * v1[d]) + (p2 * v2[d] + p3 * v3[d])
        for j in range(size - size % 4, size):
            v0 = kv[slots[base + j], 1]
            for g in range(group):
                p0 = scores[g, j]
                for d in range(head_dim):
                    values[g, d] += p0 * v0[d]


@helper
def _block_softmax(
    scores: Any, size: int, values: Any, weights: Any, g: int, head_dim: int
) -> None:
    """Turn one block's scores into weights relative to the running maximum."""
    # A constant trip count lets the loops below become straight vector code.
    for j in range(size, BLOCK):
        scores[g, j] = LOWEST
    peak = weights[0, g]
    for j in range(BLOCK):
        peak = max(peak, scores[g, j])
    if peak > weights[0, g]:
        shrink = _exp2(weights[0, g] - peak)
        weights[0, g] = peak
        weights[1, g] *= shrink
        for d in range(head_dim):
            values[g, d] *= shrink
    added = np.float32(0)
    for j in range(BLOCK):
        weight = _exp2(scores[g, j] - peak)
        scores[g, j] = weight
        added += weight
    weights[1, g] += added


@helper
def _join(
    item: int, first: int, last: int, heads: int, values: Any, weights: Any, out: Any, head_dim: int
) -> None:
    """Combine the parts of a list that ranges ``[first, last)`` share."""
    b, h = item // heads, item % heads
    group = values.shape[2]
    for g in range(group):
        peak = weights[first, 1, 0, g]
        for r in range(first + 1, last):
            peak = max(peak, weights[r, 0, 0, g])
        share = _exp2(weights[first, 1, 0, g] - peak)
        norm = share * weights[first, 1, 1, g]
        for d in range(head_dim):
            values[first, 1, g, d] *= share
        for r in range(first + 1, last):
            share = _exp2(weights[r, 0, 0, g] - peak)
            norm += share * weights[r, 0, 1, g]
            for d in range(head_dim):
                values[first, 1, g, d] += share * values[r, 0, g, d]
        for d in range(head_dim):
            out[b, h * group + g, d] = values[first, 1, g, d] / norm


@helper
def _exp2(x: Any) -> Any:
    """``2**x`` for ``x <= 0``, relative error 1e-7; library calls would not vectorise."""
    x = max(x, np.float32(-126))
    whole = np.floor(x)
    part = x - whole
    power = np.float32(1.89375e-3)
    power = power * part + np.float32(8.94959e-3)
    power = power * part + np.float32(5.586034e-2)
    power = power * part + np.float32(2.4014182e-1)
    power = power * part + np.float32(6.9315449e-1)
    power = power * part + np.float32(0.9999999)
    exponent = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return power * exponent.view(np.float32)


@helper
def _prefetch_slot(kv: Any, slot: int, head_dim: int) -> None:
    for offset in range(0, 2 * head_dim, CACHE_LINE):
        _prefetch(kv, np.intp(slot) * (2 * head_dim) + offset)


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of a contiguous array's flat element ``index``, for reading."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = make_array(signature.args[0])(context, builder, args[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        )
        address = builder.bitcast(builder.gep(data, [args[1]]), byte)
        # Level 2: the first level's few fill buffers would hold only two rows under way.
        read, level_2, data_cache = (ir.Constant(word, value) for value in (0, 2, 1))
        builder.call(function, [address, read, level_2, data_cache])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
