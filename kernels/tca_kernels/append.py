"""Writes of a step: new keys and values into the pool, new slots onto the lists."""

from __future__ import annotations

from torch import Tensor

from tca_kernels import dispatch, reference
from tca_kernels.dispatch import cdiv, check_lists, check_pool

_WRITE_TILE = 16
_LIST_TILE = 128


def write_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Store the keys and values of one layer's new tokens.

    Parameters
    ----------
    k, v : ``[T, Hkv, D]``; last dimension contiguous
    kv : ``[num_slots, 2, D]``, contiguous; written in its own dtype
    slots : int32 ``[T, Hkv]``, any strides; negative: the row is not stored (padding)
    """
    check_pool(kv, k.shape[-1])
    if not dispatch.use_triton(kv):
        reference.write_kv(k, v, kv, slots)
        return
    from tca_kernels.triton.append import write_kv_kernel

    tokens, num_heads, head_dim = k.shape
    write_kv_kernel[(cdiv(tokens * num_heads, _WRITE_TILE),)](
        k,
        k.stride(0),
        k.stride(1),
        v,
        v.stride(0),
        v.stride(1),
        kv,
        slots,
        *slots.stride(),
        tokens * num_heads,
        num_heads,
        D=head_dim,
        TILE=_WRITE_TILE,
    )


def append_slots(arena: Tensor, start: Tensor, length: Tensor, new_slots: Tensor) -> None:
    """Append one slot to every list of a decode step, in all layers and heads, in one launch.

    Parameters
    ----------
    arena : int32 ``[A]``; written at ``start + length``, which must lie in the list's capacity
    start : int64 ``[B, L, Hkv]``, contiguous
    length : int32 ``[B, L, Hkv]``, contiguous; grows by one
    new_slots : int32 ``[B, L, Hkv]``, any strides; negative: the list stays as it is (padding)
    """
    check_lists(arena=arena, start=start, length=length)
    if not dispatch.use_triton(arena):
        reference.append_slots(arena, start, length, new_slots)
        return
    from tca_kernels.triton.append import append_slots_kernel

    _, num_layers, num_heads = length.shape
    append_slots_kernel[(cdiv(length.numel(), _LIST_TILE),)](
        arena,
        start,
        length,
        new_slots,
        *new_slots.stride(),
        length.numel(),
        num_layers,
        num_heads,
        TILE=_LIST_TILE,
    )
