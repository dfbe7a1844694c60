# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Slots copied between pools, either of which may be pinned host memory."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["source_slot_ptr", "target_slot_ptr"],
)
def move_kernel(
    source_ptr,
    source_slot_ptr,
    target_ptr,
    target_slot_ptr,
    num_rows,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """``target[target_slot] = source[source_slot]``; rows of ``WIDTH`` elements."""
    lane = tl.arange(0, WIDTH)
    for first in range(tl.program_id(0) * TILE, num_rows, tl.num_programs(0) * TILE):
        row = first + tl.arange(0, TILE)
        valid = row < num_rows
        source = tl.load(source_slot_ptr + row, mask=valid, other=0).to(tl.int64)
        target = tl.load(target_slot_ptr + row, mask=valid, other=0).to(tl.int64)
        mask = valid[:, None]
        values = tl.load(source_ptr + source[:, None] * WIDTH + lane[None, :], mask=mask)
        tl.store(target_ptr + target[:, None] * WIDTH + lane[None, :], values, mask=mask)
