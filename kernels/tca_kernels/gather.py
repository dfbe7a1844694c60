"""Views: the slots that a selection leaves, and their keys and values in one piece."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tca_kernels import dispatch, reference
from tca_kernels.dispatch import cdiv, check_lists, check_pool, host_table, upload
from tca_kernels.select import Selection

_SLOT_TILE = 1024
_GATHER_TILE = 32


@dataclass(frozen=True)
class ViewSlots:
    """Slots of several views, one row after another.

    Attributes
    ----------
    slots : int32 ``[total]``
    indptr : int64 ``[R + 1]`` on the host
    """

    slots: Tensor
    indptr: Tensor


def view_slots(
    arena: Tensor, start: Tensor, candidates: Tensor, lengths: Tensor, selection: Selection
) -> ViewSlots:
    """List the slots of each row's view: kept candidates, then everything after the candidates.

    Parameters
    ----------
    arena : int32 ``[A]``, contiguous
    start : int64 ``[...]`` with ``R`` elements, on the device: where each row's list begins
    candidates, lengths : ``[...]`` with ``R`` elements, integer, **on the host**: the first
        ``candidates`` of a list's ``lengths`` entries were selected from; the others (local
        window and the chunk's own tokens) all stay
    selection : of the same rows

    Returns
    -------
    The views; row ``r`` has ``kept + lengths - candidates`` slots, in list order.
    """
    check_lists(arena=arena)
    candidates = host_table(candidates, "candidates").flatten()
    lengths = host_table(lengths, "lengths").flatten()
    kept = selection.indptr.diff()
    sizes = kept + lengths - candidates
    indptr = torch.zeros(len(sizes) + 1, dtype=torch.int64)
    torch.cumsum(sizes, 0, out=indptr[1:])
    if not dispatch.use_triton(arena):
        slots = reference.view_slots(
            arena, start, candidates, lengths, selection.indices, selection.indptr
        )
        return ViewSlots(slots, indptr)
    from tca_kernels.triton.gather import view_slots_kernel

    table = torch.stack((candidates, selection.indptr[:-1], kept, indptr[:-1], sizes), 1)
    slots = torch.empty(int(indptr[-1]), dtype=torch.int32, device=arena.device)
    view_slots_kernel[(len(sizes), max(cdiv(int(sizes.max()), _SLOT_TILE), 1))](
        arena,
        # Of a shared list, ``start`` may be expanded, which flattening alone keeps.
        start.flatten().contiguous(),
        upload(table, arena.device),
        selection.indices,
        slots,
        TILE=_SLOT_TILE,
    )
    return ViewSlots(slots, indptr)


def whole_lists(arena: Tensor, start: Tensor, lengths: Tensor) -> Tensor:
    """Copy lists out of the arena, one row after another.

    Parameters
    ----------
    arena : int32 ``[A]``
    start : int64 ``[...]`` with ``R`` elements, on the device
    lengths : ``[...]`` with ``R`` elements, integer, **on the host**

    Returns
    -------
    int32 ``[sum(lengths)]``
    """
    nothing = torch.zeros(lengths.numel(), dtype=torch.int64)
    indptr = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
    empty = torch.empty(0, device=arena.device)
    keeps_none = Selection(empty.to(torch.int32), indptr, empty)
    return view_slots(arena, start, nothing, lengths, keeps_none).slots


def gather_views(
    kv: Tensor, slots: Tensor, keys: Tensor | None = None, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Copy the rows of ``slots`` from the pool to contiguous keys and values.

    Parameters
    ----------
    kv : ``[num_slots, 2, D]``, contiguous
    slots : int32 ``[N]``, contiguous
    keys, values : ``[N, D]``, contiguous, to write to; new if absent

    Returns
    -------
    ``keys`` and ``values``, in the pool's dtype.
    """
    check_pool(kv, kv.shape[-1])
    check_lists(slots=slots)
    shape = (slots.numel(), kv.shape[-1])
    keys = kv.new_empty(shape) if keys is None else keys
    values = kv.new_empty(shape) if values is None else values
    if not dispatch.use_triton(kv):
        rows = slots.long()
        torch.index_select(kv[:, 0], 0, rows, out=keys)
        torch.index_select(kv[:, 1], 0, rows, out=values)
    elif slots.numel():
        from tca_kernels.triton.gather import gather_kernel

        gather_kernel[(cdiv(slots.numel(), _GATHER_TILE),)](
            kv, slots, keys, values, slots.numel(), D=kv.shape[-1], TILE=_GATHER_TILE
        )
    return keys, values
