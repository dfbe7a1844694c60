# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Split-KV decode attention over slot lists.

One *entry* is a (request, KV head) pair. Every entry's list is cut into tiles of ``TILE`` slots;
the tiles of all entries form one line of ``total`` tiles, and program ``p`` of ``P`` takes tiles
``[p * total // P, (p + 1) * total // P)`` of it, wherever entries begin and end. So ragged lists
leave no stragglers. A program writes one partial result per entry that it touches, to row
``program + entry``: along the line one of the two grows at every step, so no row is shared.
"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        "length_stride_b",
        "length_stride_l",
        "length_stride_h",
        "bounds_stride",
        "num_entries",
        "num_heads",
        "num_programs",
    ],
    do_not_specialize_on_alignment=["length_ptr"],
)
def split_map_kernel(
    length_ptr,
    length_stride_b,
    length_stride_l,
    length_stride_h,
    bounds_ptr,
    bounds_stride,
    first_ptr,
    num_entries,
    num_heads,
    num_programs,
    ENTRIES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per layer: where entries begin on the line, and each program's first entry."""
    layer = tl.program_id(0)
    entry = tl.arange(0, ENTRIES)
    valid = entry < num_entries
    offset = (entry // num_heads) * length_stride_b + (entry % num_heads) * length_stride_h
    length = tl.load(length_ptr + layer * length_stride_l + offset, mask=valid, other=0)
    tiles = (length + TILE - 1) // TILE
    total = tl.sum(tiles, axis=0)
    bounds_ptr += layer * bounds_stride
    tl.store(bounds_ptr, 0)
    tl.store(bounds_ptr + 1 + entry, tl.cumsum(tiles, axis=0), mask=valid)
    # The search below reads what other threads of this program have just written.
    tl.debug_barrier()

    program = tl.arange(0, PROGRAMS)
    active = tl.maximum(tl.minimum(num_programs, total), 1)
    tile = (program.to(tl.int64) * total // active).to(tl.int32)
    low = tl.zeros([PROGRAMS], tl.int32)
    high = low + num_entries
    for _ in range(STEPS):
        middle = (low + high + 1) // 2
        right = tl.load(bounds_ptr + middle) <= tile
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle - 1)
    tl.store(first_ptr + layer * num_programs + program, low, mask=program < num_programs)


@triton.jit(
    do_not_specialize=[
        "start_stride_b",
        "start_stride_h",
        "length_stride_b",
        "length_stride_h",
        "num_entries",
        "num_heads",
    ],
    do_not_specialize_on_alignment=["start_ptr", "length_ptr", "bounds_ptr", "first_ptr"],
)
def split_decode_kernel(
    q_ptr,
    q_stride_b,
    q_stride_h,
    kv_ptr,
    arena_ptr,
    start_ptr,
    start_stride_b,
    start_stride_h,
    length_ptr,
    length_stride_b,
    length_stride_h,
    bounds_ptr,
    first_ptr,
    partial_ptr,
    partial_lse_ptr,
    scale_log2,
    num_entries,
    num_heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per share of the line; writes a normalised partial and its log2-sum-exp2."""
    program = tl.program_id(0)
    entry = tl.load(first_ptr + program)
    total = tl.load(bounds_ptr + num_entries)
    active = tl.minimum(tl.num_programs(0), total)
    if program >= active:
        return
    tile = (program.to(tl.int64) * total // active).to(tl.int32)
    stop = ((program + 1).to(tl.int64) * total // active).to(tl.int32)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    lane = tl.arange(0, TILE)
    while tile < stop:
        begin = tl.load(bounds_ptr + entry)
        segment_stop = tl.minimum(tl.load(bounds_ptr + entry + 1), stop)
        request = (entry // num_heads).to(tl.int64)
        head = entry % num_heads
        length = tl.load(length_ptr + request * length_stride_b + head * length_stride_h)
        start = tl.load(start_ptr + request * start_stride_b + head * start_stride_h)
        list_ptr = arena_ptr + start
        q_offset = request * q_stride_b + (head * GROUP + row[:, None]) * q_stride_h + dim[None, :]
        q = tl.load(q_ptr + q_offset, mask=row[:, None] < GROUP, other=0.0)

        peak = tl.full([ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        # Slot ids are fetched one tile ahead, so that the loads of K and V, which the compiler
        # pipelines, never wait for another load.
        # An empty list reads its first place, which may be another's: it is weighted by nothing.
        last = tl.maximum(length - 1, 0)
        slot = tl.load(list_ptr + tl.minimum((tile - begin) * TILE + lane, last))
        for t in range(tile - begin, segment_stop - begin):
            index = t * TILE + lane
            # Past the end the last slot is read again: any other could hold NaN bits, which a
            # weight of zero does not silence.
            next_slot = tl.load(list_ptr + tl.minimum(index + TILE, last))
            k_ptr = kv_ptr + slot.to(tl.int64)[:, None] * (2 * D) + dim[None, :]
            k = tl.load(k_ptr)
            v = tl.load(k_ptr + D)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            logits = tl.where(index[None, :] < length, logits, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, axis=1))
            fade = tl.exp2(peak - new_peak)
            weights = tl.exp2(logits - new_peak[:, None])
            norm = norm * fade + tl.sum(weights, axis=1)
            acc = acc * fade[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
            peak = new_peak
            slot = next_slot

        partial = (program + entry).to(tl.int64) * GROUP + row
        tl.store(partial_lse_ptr + partial, peak + tl.log2(norm), mask=row < GROUP)
        value_ptr = partial_ptr + partial[:, None] * D + dim[None, :]
        tl.store(value_ptr, acc / norm[:, None], mask=row[:, None] < GROUP)
        tile = segment_stop
        entry += 1


@triton.jit(
    do_not_specialize=["num_entries", "num_heads", "num_programs"],
    do_not_specialize_on_alignment=["bounds_ptr"],
)
def merge_partials_kernel(
    partial_ptr,
    partial_lse_ptr,
    bounds_ptr,
    out_ptr,
    out_stride_b,
    out_stride_h,
    lse_ptr,
    num_entries,
    num_heads,
    num_programs,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (request, query head): combine the partials of its entry."""
    entry = tl.program_id(0) // GROUP
    member = tl.program_id(0) % GROUP
    begin = tl.load(bounds_ptr + entry)
    end = tl.load(bounds_ptr + entry + 1)
    total = tl.maximum(tl.load(bounds_ptr + num_entries), 1).to(tl.int64)
    active = tl.minimum(num_programs, total)
    # The program that owns tile t is the last p with p * total // active <= t.
    first = ((begin + 1) * active - 1) // total
    stop = tl.where(end > begin, (end * active - 1) // total + 1, first)

    lane = tl.arange(0, BLOCK)
    dim = tl.arange(0, D)
    peak = tl.full([], float("-inf"), tl.float32)
    norm = tl.zeros([], tl.float32)
    acc = tl.zeros([D], tl.float32)
    for p in range(first, stop, BLOCK):
        valid = p + lane < stop
        partial = (p + lane + entry) * GROUP + member
        lse = tl.load(partial_lse_ptr + partial, mask=valid, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        fade = tl.exp2(peak - new_peak)
        weight = tl.exp2(lse - new_peak)
        value_ptr = partial_ptr + partial[:, None] * D + dim[None, :]
        value = tl.load(value_ptr, mask=valid[:, None], other=0.0)
        norm = norm * fade + tl.sum(weight, axis=0)
        acc = acc * fade + tl.sum(weight[:, None] * value, axis=0)
        peak = new_peak
    request = (entry // num_heads).to(tl.int64)
    head = (entry % num_heads) * GROUP + member
    empty = end == begin
    out_offset = request * out_stride_b + head * out_stride_h + dim
    out = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, norm))
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty))
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(norm)) * 0.6931471805599453)
    tl.store(lse_ptr + request * (num_heads * GROUP) + head, lse)
