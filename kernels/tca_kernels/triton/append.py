# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""New keys and values into the pool, new slots onto the lists."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["slot_stride_t", "slot_stride_h", "num_rows", "num_heads"],
    do_not_specialize_on_alignment=["slot_ptr"],
)
def write_kv_kernel(
    k_ptr,
    k_stride_t,
    k_stride_h,
    v_ptr,
    v_stride_t,
    v_stride_h,
    kv_ptr,
    slot_ptr,
    slot_stride_t,
    slot_stride_h,
    num_rows,
    num_heads,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """A row is one (token, KV head)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token = (row // num_heads).to(tl.int64)
    head = row % num_heads
    slot_offset = token * slot_stride_t + head * slot_stride_h
    slot = tl.load(slot_ptr + slot_offset, mask=row < num_rows, other=-1).to(tl.int64)
    dim = tl.arange(0, D)
    mask = slot[:, None] >= 0
    k_offset = token * k_stride_t + head * k_stride_h
    v_offset = token * v_stride_t + head * v_stride_h
    k = tl.load(k_ptr + k_offset[:, None] + dim[None, :], mask=mask)
    v = tl.load(v_ptr + v_offset[:, None] + dim[None, :], mask=mask)
    target = kv_ptr + slot[:, None] * (2 * D) + dim[None, :]
    tl.store(target, k.to(kv_ptr.dtype.element_ty), mask=mask)
    tl.store(target + D, v.to(kv_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_lists", "num_layers", "num_heads"],
    do_not_specialize_on_alignment=["start_ptr", "length_ptr", "slot_ptr"],
)
def append_slots_kernel(
    arena_ptr,
    start_ptr,
    length_ptr,
    slot_ptr,
    slot_stride_b,
    slot_stride_l,
    slot_stride_h,
    num_lists,
    num_layers,
    num_heads,
    TILE: tl.constexpr,
):
    """A list is one (request, layer, KV head), in this order."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < num_lists
    request = index // (num_layers * num_heads)
    layer = index // num_heads % num_layers
    slot_offset = request * slot_stride_b + layer * slot_stride_l
    slot_offset += index % num_heads * slot_stride_h
    slot = tl.load(slot_ptr + slot_offset, mask=inside, other=-1)
    valid = slot >= 0
    length = tl.load(length_ptr + index, mask=valid, other=0)
    start = tl.load(start_ptr + index, mask=valid, other=0)
    tl.store(arena_ptr + start + length, slot, mask=valid)
    tl.store(length_ptr + index, length + 1, mask=valid)
