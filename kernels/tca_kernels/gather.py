"""Views: the slots that a selection leaves, and their keys and values in one piece."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True, eq=False)
class ViewTables:
    """How views are put together, with what the kernel reads of it.

    Attributes
    ----------
    candidates, lengths : int64 ``[R]`` on the host, as in ``view_slots``
    indptr : int64 ``[R + 1]`` on the host, as in ``ViewSlots``
    num_kept : entries of the selection
    num_slots, longest : slots of all views and of the longest one
    table : int64 ``[R, 5]`` on the device, as ``view_slots_kernel`` describes it
    """

    candidates: Tensor
    lengths: Tensor
    indptr: Tensor
    num_kept: int
    num_slots: int
    longest: int
    table: Tensor

    @staticmethod
    def build(
        candidates: Tensor, lengths: Tensor, kept_indptr: Tensor, device: torch.device
    ) -> list[ViewTables]:
        """Tables of ``L`` selections from the same candidates, in one upload.

        Parameters
        ----------
        candidates, lengths : ``[...]`` with ``R`` elements, integer, on the host
        kept_indptr : int64 ``[L, R + 1]`` on the host, the selections' ``indptr``

        Raises
        ------
        ValueError
            If a table is on the device.
        """
        candidates = host_table(candidates, "candidates").flatten()
        lengths = host_table(lengths, "lengths").flatten()
        kept_indptr = host_table(kept_indptr, "kept_indptr")
        kept = kept_indptr.diff(dim=1)
        sizes = kept + lengths - candidates
        indptr = F.pad(sizes.cumsum(1), (1, 0))
        columns = (candidates.expand_as(kept), kept_indptr[:, :-1], kept, indptr[:, :-1], sizes)
        table = upload(torch.stack(columns, 2), device)
        per_layer = zip(
            indptr,
            kept_indptr[:, -1].tolist(),
            indptr[:, -1].tolist(),
            sizes.amax(1).tolist(),
            table,
            strict=True,
        )
        return [ViewTables(candidates, lengths, *own) for own in per_layer]


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
    (tables,) = ViewTables.build(candidates, lengths, selection.indptr[None], arena.device)
    return view_slots_by_tables(arena, start, selection, tables)


def view_slots_by_tables(
    arena: Tensor, start: Tensor, selection: Selection, tables: ViewTables
) -> ViewSlots:
    """``view_slots`` with its tables on the device already; no copy of a contiguous ``start``.

    Raises
    ------
    ValueError
        If the tables are of another number of kept entries.
    """
    check_lists(arena=arena)
    if tables.num_kept != selection.indices.numel():
        raise ValueError(f"{tables.num_kept} kept entries, not {selection.indices.numel()}")
    if not dispatch.use_triton(arena):
        slots = reference.view_slots(
            arena, start, tables.candidates, tables.lengths, selection.indices, selection.indptr
        )
        return ViewSlots(slots, tables.indptr)
    from tca_kernels.triton.gather import view_slots_kernel

    slots = torch.empty(tables.num_slots, dtype=torch.int32, device=arena.device)
    view_slots_kernel[(len(tables.lengths), max(cdiv(tables.longest, _SLOT_TILE), 1))](
        arena,
        # Of a shared list, ``start`` may be expanded, which flattening alone keeps.
        start.flatten().contiguous(),
        tables.table,
        selection.indices,
        slots,
        TILE=_SLOT_TILE,
    )
    return ViewSlots(slots, tables.indptr)


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
