# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Probe scoring on Hopper: two selections over one list read each tile of keys once.

The same two passes as ``triton/score.py``, with the schedule written out: a tile of keys stays in
shared memory while the probes of both selections are multiplied with it, and the exponentials of
one product run while the tensor cores work on the next. Two accumulators take turns; keys arrive
``STAGES - 1`` tiles ahead, their slot numbers one tile further.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.9 took the old name away.
_load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_UNSPECIALISED = ["start_stride_h", "num_items", "num_heads", "chunk"]
_UNALIGNED = ["start_ptr", "table_ptr"]


@gluon.jit
def _items(num_items, num_heads):
    """This program's head, its items ``2 i`` and ``2 i + 1``, and the pair of each with the head.

    An odd last item is computed twice.
    """
    pairs = (num_items + 1) // 2
    first_item = gl.program_id(0) % pairs * 2
    second_item = gl.minimum(first_item + 1, num_items - 1)
    head = gl.program_id(0) // pairs
    first_pair = first_item * num_heads + head
    second_pair = second_item * num_heads + head
    return head, first_item, second_item, first_pair, second_pair


@gluon.jit
def _part(arena_ptr, start_ptr, start_stride_h, head, begin, length, chunk, BLOCK: gl.constexpr):
    """This program's part of a list: its tiles, where it starts and the slots left from there."""
    tiles = (gl.minimum(begin + chunk, length) - begin + BLOCK - 1) // BLOCK
    list_ptr = arena_ptr + gl.load(start_ptr + head * start_stride_h) + begin
    return tiles, list_ptr, length - begin


@gluon.jit
def _load_queries(
    queries,
    q_ptr,
    q_stride_n,
    q_stride_p,
    q_stride_h,
    item,
    head,
    PROBES: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    offset = item.to(gl.int64) * q_stride_n + (row // GROUP) * q_stride_p
    offset += (head * GROUP + row % GROUP) * q_stride_h
    mask = row[:, None] < PROBES * GROUP
    queries.store(gl.load(q_ptr + offset[:, None] + dim[None, :], mask=mask, other=0.0))


@gluon.jit
def _slots(list_ptr, first, length, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    # Past the end the last slot is read again; its weight is masked or never stored.
    index = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LAYOUT))
    return gl.load(list_ptr + gl.minimum(index, length - 1))


@gluon.jit
def _copy_keys(keys, kv_ptr, slot, D: gl.constexpr, LAYOUT: gl.constexpr):
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    pointer = kv_ptr + slot.to(gl.int64)[:, None] * (2 * D) + dim[None, :]
    _load_async(keys, pointer)
    async_copy.commit_group()


@gluon.jit
def _fill_shared(
    q_ptr,
    q_stride_n,
    q_stride_p,
    q_stride_h,
    first_item,
    second_item,
    head,
    kv_ptr,
    list_ptr,
    left,
    PROBES: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Both items' queries, the keys with ``STAGES - 1`` tiles on their way, and the next slots."""
    kind: gl.constexpr = kv_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], kind)
    queries = gl.allocate_shared_memory(kind, [2, ROWS, D], shared)
    keys = gl.allocate_shared_memory(kind, [STAGES, BLOCK, D], shared)
    for i in gl.static_range(STAGES - 1):
        key = keys.index(i)
        _copy_keys(key, kv_ptr, _slots(list_ptr, i * BLOCK, left, BLOCK, LAYOUT), D, LAYOUT)
    slot = _slots(list_ptr, (STAGES - 1) * BLOCK, left, BLOCK, LAYOUT)
    source = (q_ptr, q_stride_n, q_stride_p, q_stride_h)
    _load_queries(queries.index(0), *source, first_item, head, PROBES, GROUP, ROWS, D, LAYOUT)
    _load_queries(queries.index(1), *source, second_item, head, PROBES, GROUP, ROWS, D, LAYOUT)
    return queries, keys, slot


@gluon.jit
def _arrived(keys, tile, PENDING: gl.constexpr, STAGES: gl.constexpr):
    """A tile of keys, which is there once no more than ``PENDING`` copies are under way."""
    async_copy.wait_group(PENDING)
    fence_async_shared()
    return keys.index(tile % STAGES)


@gluon.jit
def _add_tile(logits, peak, norm, scale_log2):
    """Online softmax statistics with one more tile of logits ``[ROWS, BLOCK]``."""
    new_peak = gl.maximum(peak, gl.max(logits, axis=1) * scale_log2)
    # A row that has seen nothing yet must not compute inf - inf.
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(logits * scale_log2 - base[:, None])
    return new_peak, norm * gl.exp2(peak - base) + gl.sum(weights, axis=1)


@gluon.jit
def _add_to_lse(logits, peak, norm, first, open_until, probe, scale_log2, LAYOUT: gl.constexpr):
    # Both branches hold all of the work, not only the mask: the compiler moves nothing out of
    # them, and would otherwise wait for the running product first.
    BLOCK: gl.constexpr = logits.shape[1]
    if first + BLOCK > open_until:
        index = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
        seen = index[None, :] < (open_until + probe)[:, None]
        peak, norm = _add_tile(gl.where(seen, logits, float("-inf")), peak, norm, scale_log2)
    else:
        peak, norm = _add_tile(logits, peak, norm, scale_log2)
    return peak, norm


@gluon.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNALIGNED)
def paired_lse_kernel(
    q_ptr,
    q_stride_n,
    q_stride_p,
    q_stride_h,
    kv_ptr,
    arena_ptr,
    start_ptr,
    start_stride_h,
    table_ptr,
    partial_ptr,
    scale_log2,
    num_items,
    num_heads,
    chunk,
    PROBES: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """First pass, as ``probe_lse_kernel``, for items ``2 i`` and ``2 i + 1`` of one head."""
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)

    head, first_item, second_item, first_pair, second_pair = _items(num_items, num_heads)
    first_length = gl.load(table_ptr + first_pair * 3).to(gl.int32)
    second_length = gl.load(table_ptr + second_pair * 3).to(gl.int32)
    length = gl.maximum(first_length, second_length)
    begin = gl.program_id(1) * chunk
    if begin >= length:
        return
    tiles, list_ptr, left = _part(
        arena_ptr, start_ptr, start_stride_h, head, begin, length, chunk, BLOCK
    )
    queries, keys, slot = _fill_shared(
        q_ptr, q_stride_n, q_stride_p, q_stride_h, first_item, second_item, head,
        kv_ptr, list_ptr, left, PROBES, GROUP, ROWS, D, BLOCK, STAGES, copy,
    )  # fmt: skip

    probe = gl.arange(0, ROWS, layout=by_row) // GROUP
    first_open = first_length - PROBES + 1
    second_open = second_length - PROBES + 1
    first_peak = gl.full([ROWS], float("-inf"), gl.float32, layout=by_row)
    second_peak = gl.full([ROWS], float("-inf"), gl.float32, layout=by_row)
    first_norm = gl.zeros([ROWS], gl.float32, layout=by_row)
    second_norm = gl.zeros([ROWS], gl.float32, layout=by_row)
    zero = gl.zeros([ROWS, BLOCK], gl.float32, layout=mma)
    first_queries, second_queries = queries.index(0), queries.index(1)
    key = _arrived(keys, 0, STAGES - 2, STAGES).permute((1, 0))
    product = warpgroup_mma(first_queries, key, zero, use_acc=False, is_async=True)
    first_logits = warpgroup_mma_wait(0, deps=[product])
    for t in range(tiles):
        place = begin + t * BLOCK
        key = keys.index(t % STAGES).permute((1, 0))
        product = warpgroup_mma(second_queries, key, zero, use_acc=False, is_async=True)
        first_peak, first_norm = _add_to_lse(
            first_logits, first_peak, first_norm, place, first_open, probe, scale_log2, mma
        )
        second_logits = warpgroup_mma_wait(0, deps=[product])
        # The next tile is there, and every warp is done with the one before this.
        key = _arrived(keys, t + 1, STAGES - 3, STAGES).permute((1, 0))
        product = warpgroup_mma(first_queries, key, zero, use_acc=False, is_async=True)
        _copy_keys(keys.index((t + STAGES - 1) % STAGES), kv_ptr, slot, D, copy)
        slot = _slots(list_ptr, (t + STAGES) * BLOCK, left, BLOCK, copy)
        second_peak, second_norm = _add_to_lse(
            second_logits, second_peak, second_norm, place, second_open, probe, scale_log2, mma
        )
        first_logits = warpgroup_mma_wait(0, deps=[product])
    async_copy.wait_group(0)
    row = gl.arange(0, ROWS, layout=by_row)
    partial_ptr += (gl.program_id(1) * num_items * num_heads).to(gl.int64) * ROWS
    gl.store(partial_ptr + first_pair * ROWS + row, first_peak + gl.log2(first_norm))
    gl.store(partial_ptr + second_pair * ROWS + row, second_peak + gl.log2(second_norm))


@gluon.jit
def _load_lse(lse_ptr, pair, USED: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """One item's log-sum-exps, in shared memory."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row = gl.arange(0, ROWS, layout=LAYOUT)
    # Rows that only pad the matrix product weigh nothing.
    lse = gl.load(lse_ptr + pair * ROWS + row, mask=row < USED, other=float("inf"))
    return gl.allocate_shared_memory(gl.float32, [ROWS], flat, lse)


@gluon.jit
def _store_weights(
    logits, lse, out_ptr, first, count, open_until, probe, scale_log2, rows, LAYOUT: gl.constexpr
):
    """Mean of the rows' softmax weights for one tile of logits ``[BLOCK, ROWS]``."""
    BLOCK: gl.constexpr = logits.shape[0]
    index = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LAYOUT))
    # Read again for every tile: in registers they would spill.
    lse = lse.load(gl.SliceLayout(0, LAYOUT))
    # Two branches for the reason given in ``_add_to_lse``.
    if first + BLOCK > gl.minimum(open_until, count):
        weights = gl.exp2(logits * scale_log2 - lse[None, :])
        weights = gl.where(index[:, None] < (open_until + probe)[None, :], weights, 0.0)
        gl.store(out_ptr + index, gl.sum(weights, axis=1) * (1.0 / rows), mask=index < count)
    else:
        weights = gl.exp2(logits * scale_log2 - lse[None, :])
        gl.store(out_ptr + index, gl.sum(weights, axis=1) * (1.0 / rows))


@gluon.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNALIGNED)
def paired_weights_kernel(
    q_ptr,
    q_stride_n,
    q_stride_p,
    q_stride_h,
    kv_ptr,
    arena_ptr,
    start_ptr,
    start_stride_h,
    table_ptr,
    lse_ptr,
    out_ptr,
    scale_log2,
    num_items,
    num_heads,
    chunk,
    PROBES: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Second pass, as ``probe_weights_kernel``, for items ``2 i`` and ``2 i + 1`` of one head."""
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    # Keys are the rows of this product: the sum over probes then stays inside a warp.
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ROWS, 16])
    by_column: gl.constexpr = gl.SliceLayout(0, mma)

    head, first_item, second_item, first_pair, second_pair = _items(num_items, num_heads)
    first_table, second_table = table_ptr + first_pair * 3, table_ptr + second_pair * 3
    first_count = gl.load(first_table + 1).to(gl.int32)
    second_count = gl.load(second_table + 1).to(gl.int32)
    count = gl.maximum(first_count, second_count)
    begin = gl.program_id(1) * chunk
    if begin >= count:
        return
    tiles, list_ptr, left = _part(
        arena_ptr, start_ptr, start_stride_h, head, begin, count, chunk, BLOCK
    )
    queries, keys, slot = _fill_shared(
        q_ptr, q_stride_n, q_stride_p, q_stride_h, first_item, second_item, head,
        kv_ptr, list_ptr, left, PROBES, GROUP, ROWS, D, BLOCK, STAGES, copy,
    )  # fmt: skip

    probe = gl.arange(0, ROWS, layout=by_column) // GROUP
    rows: gl.constexpr = PROBES * GROUP
    first_lse = _load_lse(lse_ptr, first_pair, rows, ROWS, by_column)
    second_lse = _load_lse(lse_ptr, second_pair, rows, ROWS, by_column)
    first_open = gl.load(first_table).to(gl.int32) - PROBES + 1
    second_open = gl.load(second_table).to(gl.int32) - PROBES + 1
    first_out = out_ptr + gl.load(first_table + 2)
    second_out = out_ptr + gl.load(second_table + 2)
    zero = gl.zeros([BLOCK, ROWS], gl.float32, layout=mma)
    first_queries = queries.index(0).permute((1, 0))
    second_queries = queries.index(1).permute((1, 0))
    key = _arrived(keys, 0, STAGES - 2, STAGES)
    product = warpgroup_mma(key, first_queries, zero, use_acc=False, is_async=True)
    first_logits = warpgroup_mma_wait(0, deps=[product])
    for t in range(tiles):
        place = begin + t * BLOCK
        key = keys.index(t % STAGES)
        product = warpgroup_mma(key, second_queries, zero, use_acc=False, is_async=True)
        _store_weights(
            first_logits, first_lse, first_out, place, first_count, first_open, probe,
            scale_log2, rows, mma,
        )  # fmt: skip
        second_logits = warpgroup_mma_wait(0, deps=[product])
        key = _arrived(keys, t + 1, STAGES - 3, STAGES)
        product = warpgroup_mma(key, first_queries, zero, use_acc=False, is_async=True)
        _copy_keys(keys.index((t + STAGES - 1) % STAGES), kv_ptr, slot, D, copy)
        slot = _slots(list_ptr, (t + STAGES) * BLOCK, left, BLOCK, copy)
        _store_weights(
            second_logits, second_lse, second_out, place, second_count, second_open, probe,
            scale_log2, rows, mma,
        )  # fmt: skip
        first_logits = warpgroup_mma_wait(0, deps=[product])
    async_copy.wait_group(0)
