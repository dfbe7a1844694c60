"""Element-wise steps around the projections, each in one pass over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tca_kernels import dispatch
from tca_kernels.dispatch import cdiv, next_power_of_2

# (heads, elements or columns per program, warps)
_ROTATE_TILE = (16, 2)
_ROW_TILE = (4096, 4)
_SILU_TILE = (2048, 4)
# Elements that a program, and a warp of it, can hold in registers.
_WIDEST_NORM = 16384
_NORM_WARP = 512
# Elements below which another CPU thread costs more than it saves.
_THREAD_ELEMENTS = 1 << 15


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension of ``[T, N]``.

    Computed in float32, rounded once.
    """
    if x.is_contiguous() and dispatch.use_numba(x):
        from tca_kernels.cpu.elementwise import rms_norm_kernel as rms_norm_on_cpu

        out = torch.empty_like(x)
        parts = dispatch.cpu_parts(x.numel(), _THREAD_ELEMENTS)
        rms_norm_on_cpu()(x.numpy(), weight.numpy(), eps, out.numpy(), parts)
        return out
    width = x.shape[-1]
    if not (x.is_contiguous() and dispatch.use_triton(x) and width <= _WIDEST_NORM):
        return F.rms_norm(x, (width,), weight, eps)
    from tca_kernels.triton.fused import rms_norm_kernel

    out = torch.empty_like(x)
    padded = next_power_of_2(width)
    if x.numel():
        rms_norm_kernel[(x.numel() // width,)](
            x,
            weight,
            out,
            width,
            eps,
            WIDTH=padded,
            num_warps=min(max(padded // _NORM_WARP, 1), 16),
        )
    return out


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, tile: tuple[int, int] = _ROTATE_TILE) -> Tensor:
    """Rotary position encoding of queries and keys; may work in place.

    Parameters
    ----------
    heads : ``[T, H, D]``; last dimension contiguous
    cos : ``[T, 1, D]``, both halves alike
    sin : ``[T, 1, D]``, the first half negated
    tile : heads and warps per program

    Returns
    -------
    ``heads * cos + swapped(heads) * sin``, where ``swapped`` exchanges a head's halves.
    """
    if dispatch.use_numba(heads):
        from tca_kernels.cpu.elementwise import rotate_kernel as rotate_on_cpu

        parts = dispatch.cpu_parts(heads.numel(), _THREAD_ELEMENTS)
        rotate_on_cpu()(heads.numpy(), cos[:, 0].numpy(), sin[:, 0].numpy(), parts)
        return heads
    if not dispatch.use_triton(heads):
        swapped = heads.roll(heads.shape[-1] // 2, -1)
        return torch.addcmul(heads * cos, swapped, sin)
    from tca_kernels.triton.fused import rotate_kernel

    tokens, num_heads, head_dim = heads.shape
    if tokens:
        rotate_kernel[(tokens, cdiv(num_heads, tile[0]))](
            heads,
            heads.stride(0),
            heads.stride(1),
            cos,
            cos.stride(0),
            sin,
            sin.stride(0),
            num_heads,
            HALF=head_dim // 2,
            HEADS=tile[0],
            num_warps=tile[1],
        )
    return heads


def silu_mul(gate_up: Tensor, tile: tuple[int, int] = _SILU_TILE) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 I]`` (gate first): ``[T, I]``, contiguous.

    ``tile``: columns and warps per program.
    """
    width = gate_up.shape[-1] // 2
    if not dispatch.use_triton(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)
    from tca_kernels.triton.fused import silu_mul_kernel

    out = gate_up.new_empty(len(gate_up), width)
    if len(out):
        silu_mul_kernel[(len(out), cdiv(width, tile[0]))](
            gate_up, gate_up.stride(0), out, width, TILE=tile[0], num_warps=tile[1]
        )
    return out


def copy_rows(source: Tensor, target: Tensor, tile: tuple[int, int] = _ROW_TILE) -> None:
    """Copy ``[A, B, C, W]`` into another layout; rows of ``W`` are contiguous in both.

    ``tile``: elements and warps per program.
    """
    if not dispatch.use_triton(source):
        target.copy_(source)
        return
    from tca_kernels.triton.fused import copy_rows_kernel

    outer, rows, inner, width = source.shape
    padded = next_power_of_2(width)
    count = max(1, tile[0] // padded)
    if source.numel():
        copy_rows_kernel[(cdiv(rows, count), inner, outer)](
            source,
            *source.stride()[:3],
            target,
            *target.stride()[:3],
            rows,
            width,
            TILE=count,
            WIDTH=padded,
            num_warps=tile[1],
        )
