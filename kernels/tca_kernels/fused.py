"""Element-wise steps around the projections, each in one pass over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tca_kernels import dispatch
from tca_kernels.dispatch import cdiv, next_power_of_2

_HEADS = 16
_ROW_ELEMENTS = 4096
_SILU_TILE = 2048
# Elements below which another CPU thread costs more than it saves.
_THREAD_ELEMENTS = 1 << 15


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension of ``[T, N]``."""
    if not (dispatch.use_numba(x) and x.is_contiguous()):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    from tca_kernels.cpu.elementwise import rms_norm_kernel

    out = torch.empty_like(x)
    parts = dispatch.cpu_parts(x.numel(), _THREAD_ELEMENTS)
    rms_norm_kernel()(x.numpy(), weight.numpy(), eps, out.numpy(), parts)
    return out


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position encoding of queries and keys; may work in place.

    Parameters
    ----------
    heads : ``[T, H, D]``; last dimension contiguous
    cos : ``[T, 1, D]``, both halves alike
    sin : ``[T, 1, D]``, the first half negated

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
        rotate_kernel[(tokens, cdiv(num_heads, _HEADS))](
            heads,
            heads.stride(0),
            heads.stride(1),
            cos,
            cos.stride(0),
            sin,
            sin.stride(0),
            num_heads,
            HALF=head_dim // 2,
            HEADS=_HEADS,
            num_warps=2,
        )
    return heads


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 I]`` (gate first): ``[T, I]``, contiguous."""
    width = gate_up.shape[-1] // 2
    if not dispatch.use_triton(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)
    from tca_kernels.triton.fused import silu_mul_kernel

    out = gate_up.new_empty(len(gate_up), width)
    if len(out):
        silu_mul_kernel[(len(out), cdiv(width, _SILU_TILE))](
            gate_up, gate_up.stride(0), out, width, TILE=_SILU_TILE
        )
    return out


def copy_rows(source: Tensor, target: Tensor) -> None:
    """Copy ``[A, B, C, W]`` into another layout; rows of ``W`` are contiguous in both."""
    if not dispatch.use_triton(source):
        target.copy_(source)
        return
    from tca_kernels.triton.fused import copy_rows_kernel

    outer, rows, inner, width = source.shape
    padded = next_power_of_2(width)
    tile = max(1, _ROW_ELEMENTS // padded)
    if source.numel():
        copy_rows_kernel[(cdiv(rows, tile), inner, outer)](
            source,
            *source.stride()[:3],
            target,
            *target.stride()[:3],
            rows,
            width,
            TILE=tile,
            WIDTH=padded,
        )
