# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Slot lists of views, and rows of the pool copied to contiguous K and V."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["start_ptr", "table_ptr"])
def view_slots_kernel(arena_ptr, start_ptr, table_ptr, index_ptr, out_ptr, TILE: tl.constexpr):
    """One program per (row, tile of the row's output).

    ``table[row]`` = (candidates, first kept index, kept, first output, outputs).
    """
    row = tl.program_id(0)
    table_ptr += row * 5
    outputs = tl.load(table_ptr + 4)
    first = tl.program_id(1) * TILE
    if first >= outputs:
        return
    candidates = tl.load(table_ptr)
    kept = tl.load(table_ptr + 2)
    place = first + tl.arange(0, TILE)
    chosen = tl.load(index_ptr + tl.load(table_ptr + 1) + place, mask=place < kept, other=0)
    index = tl.where(place < kept, chosen, candidates + place - kept)
    valid = place < outputs
    slot = tl.load(arena_ptr + tl.load(start_ptr + row) + index, mask=valid, other=0)
    tl.store(out_ptr + tl.load(table_ptr + 3) + place, slot, mask=valid)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slot_ptr"])
def gather_kernel(kv_ptr, slot_ptr, k_ptr, v_ptr, num_rows, D: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = row < num_rows
    slot = tl.load(slot_ptr + row, mask=valid, other=0).to(tl.int64)
    dim = tl.arange(0, D)
    source = kv_ptr + slot[:, None] * (2 * D) + dim[None, :]
    target = row.to(tl.int64)[:, None] * D + dim[None, :]
    k = tl.load(source, mask=valid[:, None])
    v = tl.load(source + D, mask=valid[:, None])
    tl.store(k_ptr + target, k, mask=valid[:, None])
    tl.store(v_ptr + target, v, mask=valid[:, None])
