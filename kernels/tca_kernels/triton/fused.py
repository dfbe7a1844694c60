# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Small element-wise steps of a decoder layer, each in one pass over memory."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_heads"])
def rotate_kernel(
    head_ptr,
    head_stride_t,
    head_stride_h,
    cos_ptr,
    cos_stride_t,
    sin_ptr,
    sin_stride_t,
    num_heads,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate all heads of one token in place; ``sin`` is negative in its first half."""
    token = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, HALF)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    mask = (head < num_heads)[:, None]
    first_ptr = head_ptr + token * head_stride_t + head[:, None] * head_stride_h + dim[None, :]
    cos_ptr += token * cos_stride_t + dim
    sin_ptr += token * sin_stride_t + dim
    first = tl.load(first_ptr, mask=mask).to(tl.float32)
    second = tl.load(first_ptr + HALF, mask=mask).to(tl.float32)
    cos_first = tl.load(cos_ptr).to(tl.float32)[None, :]
    cos_second = tl.load(cos_ptr + HALF).to(tl.float32)[None, :]
    sin_first = tl.load(sin_ptr).to(tl.float32)[None, :]
    sin_second = tl.load(sin_ptr + HALF).to(tl.float32)[None, :]
    kind = head_ptr.dtype.element_ty
    tl.store(first_ptr, (first * cos_first + second * sin_first).to(kind), mask=mask)
    tl.store(first_ptr + HALF, (second * cos_second + first * sin_second).to(kind), mask=mask)


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, width, eps, WIDTH: tl.constexpr):
    """``x / sqrt(mean(x^2) + eps) * weight``, one program per row of ``[T, width]``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    x = tl.load(x_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps) * weight
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["row_stride"])
def silu_mul_kernel(source_ptr, row_stride, target_ptr, width, TILE: tl.constexpr):
    """``silu(source[:, :width]) * source[:, width:]``, one program per (row, tile)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < width
    source_ptr += row * row_stride + column
    gate = tl.load(source_ptr, mask=mask).to(tl.float32)
    up = tl.load(source_ptr + width, mask=mask).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(target_ptr + row * width + column, out.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["source_stride_a", "target_stride_a", "num_b"],
)
def copy_rows_kernel(
    source_ptr,
    source_stride_a,
    source_stride_b,
    source_stride_c,
    target_ptr,
    target_stride_a,
    target_stride_b,
    target_stride_c,
    num_b,
    width,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copy ``[A, B, C, width]`` between layouts, ``TILE`` rows along B per program."""
    a = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, WIDTH)
    mask = (b < num_b)[:, None] & (lane < width)[None, :]
    source_ptr += a * source_stride_a + c * source_stride_c
    target_ptr += a * target_stride_a + c * target_stride_c
    b = b.to(tl.int64)[:, None]
    values = tl.load(source_ptr + b * source_stride_b + lane[None, :], mask=mask)
    tl.store(target_ptr + b * target_stride_b + lane[None, :], values, mask=mask)
