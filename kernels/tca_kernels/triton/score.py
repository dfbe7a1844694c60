# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Probe scoring: mean of the probes' softmaxes over each list, in two passes over K.

One *row* of softmax is a (probe, group head) pair; all rows of an (item, KV head) share one
matrix product per tile of keys. The first pass finds each row's log-sum-exp, the second sums the
normalised weights over the rows. Keeping the logits between the passes would move more bytes
than reading K again: 128 rows of 2 bytes, written and read, against one key of 256.

Lists are cut into chunks of ``chunk`` slots, one program each. Programs are numbered with the
item fastest: items whose lists are prefixes of one another run side by side and find each
other's keys in the L2 cache. ``table`` holds, per (item, KV head), the list's length, the number
of scores wanted and where they go.
"""

import triton
import triton.language as tl

_UNSPECIALISED = ["start_stride_n", "start_stride_h", "num_items", "num_heads", "chunk"]


@triton.jit
def _queries(
    q_ptr,
    q_stride_n,
    q_stride_p,
    q_stride_h,
    item,
    head,
    PROBES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    offset = item.to(tl.int64) * q_stride_n + (row // GROUP) * q_stride_p
    offset += (head * GROUP + row % GROUP) * q_stride_h
    pointer = q_ptr + offset[:, None] + tl.arange(0, D)[None, :]
    return tl.load(pointer, mask=row[:, None] < PROBES * GROUP, other=0.0)


@triton.jit
def _keys(kv_ptr, slot, D: tl.constexpr):
    return tl.load(kv_ptr + slot.to(tl.int64)[:, None] * (2 * D) + tl.arange(0, D)[None, :])


@triton.jit
def _slots(list_ptr, index, length):
    # Past the end the last slot is read again; its weight is masked or never stored.
    return tl.load(list_ptr + tl.minimum(index, length - 1))


@triton.jit(
    do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=["start_ptr", "table_ptr"]
)
def probe_lse_kernel(
    q_ptr,
    q_stride_n,
    q_stride_p,
    q_stride_h,
    kv_ptr,
    arena_ptr,
    start_ptr,
    start_stride_n,
    start_stride_h,
    table_ptr,
    partial_ptr,
    scale_log2,
    num_items,
    num_heads,
    chunk,
    PROBES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First pass: log2-sum-exp2 of every row over one chunk, to ``partial[chunk, pair, row]``."""
    item = tl.program_id(0) % num_items
    head = tl.program_id(0) // num_items
    pair = item * num_heads + head
    length = tl.load(table_ptr + pair * 3)
    begin = tl.program_id(1) * chunk
    if begin >= length:
        return
    end = tl.minimum(begin + chunk, length)
    list_ptr = arena_ptr + tl.load(start_ptr + item * start_stride_n + head * start_stride_h)
    q = _queries(q_ptr, q_stride_n, q_stride_p, q_stride_h, item, head, PROBES, GROUP, ROWS, D)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    # Probe i is the list's entry length - PROBES + i and sees everything up to itself.
    limit = length - PROBES + 1 + row // GROUP
    tiles = (end - begin + BLOCK - 1) // BLOCK
    open_tiles = tl.maximum(tl.minimum(end, length - PROBES + 1) - begin, 0) // BLOCK

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    slot = _slots(list_ptr, begin + lane, length)
    for t in range(0, open_tiles):
        next_slot = _slots(list_ptr, begin + (t + 1) * BLOCK + lane, length)
        logits = tl.dot(q, tl.trans(_keys(kv_ptr, slot, D)), input_precision="tf32x3")
        new_peak = tl.maximum(peak, tl.max(logits, axis=1) * scale_log2)
        weights = tl.exp2(logits * scale_log2 - new_peak[:, None])
        norm = norm * tl.exp2(peak - new_peak) + tl.sum(weights, axis=1)
        peak = new_peak
        slot = next_slot
    for t in range(open_tiles, tiles):
        index = begin + t * BLOCK + lane
        keys = _keys(kv_ptr, _slots(list_ptr, index, length), D)
        logits = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale_log2
        logits = tl.where(index[None, :] < limit[:, None], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        # A row that has seen nothing yet must not compute inf - inf.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        norm = norm * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        peak = new_peak
    pairs = num_items * num_heads
    partial = (tl.program_id(1) * pairs + pair).to(tl.int64) * ROWS + row
    tl.store(partial_ptr + partial, peak + tl.log2(norm))


@triton.jit(do_not_specialize=["pairs", "chunk"], do_not_specialize_on_alignment=["table_ptr"])
def probe_merge_kernel(
    partial_ptr, table_ptr, lse_ptr, pairs, chunk, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Combine the chunks' log2-sum-exp2 into ``lse[pair, row]``."""
    pair = tl.program_id(0)
    length = tl.load(table_ptr + pair * 3)
    chunks = (length + chunk - 1) // chunk
    row = tl.arange(0, ROWS)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    for first in range(0, chunks, BLOCK):
        c = first + tl.arange(0, BLOCK)
        offset = (c.to(tl.int64) * pairs + pair)[:, None] * ROWS + row[None, :]
        part = tl.load(partial_ptr + offset, mask=(c < chunks)[:, None], other=float("-inf"))
        # The first chunk holds at least one entry that every probe sees, so this is finite.
        new_peak = tl.maximum(peak, tl.max(part, axis=0))
        norm = norm * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(part - new_peak[None, :]), axis=0)
        peak = new_peak
    tl.store(lse_ptr + pair * ROWS + row, peak + tl.log2(norm))


@triton.jit(
    do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=["start_ptr", "table_ptr"]
)
def probe_weights_kernel(
    q_ptr,
    q_stride_n,
    q_stride_p,
    q_stride_h,
    kv_ptr,
    arena_ptr,
    start_ptr,
    start_stride_n,
    start_stride_h,
    table_ptr,
    lse_ptr,
    out_ptr,
    scale_log2,
    num_items,
    num_heads,
    chunk,
    PROBES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second pass: the mean of the rows' softmax weights at every wanted entry of one chunk."""
    item = tl.program_id(0) % num_items
    head = tl.program_id(0) // num_items
    pair = item * num_heads + head
    length = tl.load(table_ptr + pair * 3)
    count = tl.load(table_ptr + pair * 3 + 1)
    begin = tl.program_id(1) * chunk
    if begin >= count:
        return
    end = tl.minimum(begin + chunk, count)
    list_ptr = arena_ptr + tl.load(start_ptr + item * start_stride_n + head * start_stride_h)
    out_ptr += tl.load(table_ptr + pair * 3 + 2)
    q = _queries(q_ptr, q_stride_n, q_stride_p, q_stride_h, item, head, PROBES, GROUP, ROWS, D)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    # Rows that only pad the matrix product weigh nothing.
    lse = tl.load(lse_ptr + pair * ROWS + row, mask=row < PROBES * GROUP, other=float("inf"))
    limit = length - PROBES + 1 + row // GROUP
    tiles = (end - begin + BLOCK - 1) // BLOCK
    open_tiles = tl.maximum(tl.minimum(end, length - PROBES + 1) - begin, 0) // BLOCK

    # Keys are the rows of this product: the sum over probes then stays inside a warp.
    slot = _slots(list_ptr, begin + lane, length)
    for t in range(0, open_tiles):
        index = begin + t * BLOCK + lane
        next_slot = _slots(list_ptr, index + BLOCK, length)
        logits = tl.dot(_keys(kv_ptr, slot, D), tl.trans(q), input_precision="tf32x3")
        weights = tl.exp2(logits * scale_log2 - lse[None, :])
        tl.store(out_ptr + index, tl.sum(weights, axis=1) / (PROBES * GROUP))
        slot = next_slot
    for t in range(open_tiles, tiles):
        index = begin + t * BLOCK + lane
        keys = _keys(kv_ptr, _slots(list_ptr, index, length), D)
        logits = tl.dot(keys, tl.trans(q), input_precision="tf32x3")
        weights = tl.exp2(logits * scale_log2 - lse[None, :])
        weights = tl.where(index[:, None] < limit[None, :], weights, 0.0)
        tl.store(out_ptr + index, tl.sum(weights, axis=1) / (PROBES * GROUP), mask=index < end)
