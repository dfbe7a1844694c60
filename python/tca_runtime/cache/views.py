"""The slot lists that running requests attend to, laid out for the attention kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_kernels.dispatch import upload
from tca_runtime.attention.base import SlotLists
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.runs import bounded, joined
from tca_runtime.cache.segments import SegmentAllocator

# Entries of lists that are written together; bounds the memory of their places, 24 bytes each.
WRITTEN_AT_ONCE = 1 << 25


class View:
    """One request's slot lists: per row ``lengths + grown`` visible entries.

    Lengths differ between rows only by what selection dropped when the view was opened; from
    then on every row grows alike, so one host integer follows them all.

    Attributes
    ----------
    index : the request's row in the device tables
    lengths : int64 ``[rows]``, entries the view was opened with
    grown : entries made visible since
    prepared : entries written but not yet visible
    headroom : entries that still fit, prepared ones included
    """

    def __init__(
        self, index: int, offset: int, size: int, lengths: NDArray[np.int64], headroom: int
    ) -> None:
        self.index = index
        self.offset = offset
        self.size = size
        self.lengths = lengths
        self.headroom = headroom
        self.grown = 0
        self.prepared = 0

    @property
    def uniform_length(self) -> int | None:
        """Visible entries per row, or None when rows differ."""
        first = int(self.lengths[0])
        return first + self.grown if bool((self.lengths == first).all()) else None


class ViewTable:
    """All views in one int32 arena, with start and length per (request, row) on the device.

    The last table row belongs to no request: captured graphs pad their batch with it, and it
    lists slot 0 alone.

    Parameters
    ----------
    max_requests : views that can be open at once
    num_layers, num_kv_heads : a row is (layer, head)
    capacity : arena entries
    """

    def __init__(
        self,
        max_requests: int,
        num_layers: int,
        num_kv_heads: int,
        capacity: int,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.rows = num_layers * num_kv_heads
        self.padding_index = max_requests
        self.arena = torch.empty(capacity + 1, dtype=torch.int32, device=device)
        self.arena[capacity] = 0
        self.start = torch.full((max_requests + 1, self.rows), capacity, device=device)
        self.length = torch.ones(max_requests + 1, self.rows, dtype=torch.int32, device=device)
        self._segments = SegmentAllocator(capacity)
        self._indices = list(range(max_requests - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Arena entries not in use."""
        return self._segments.num_free

    def open(self, parts: Sequence[HeadSlots], headroom: int) -> View | None:
        """Lay out consecutive runs of tokens; None when the arena or the table is full."""
        lengths = np.zeros(self.rows, dtype=np.int64)
        for part in parts:
            lengths += part.lengths
        size = int(lengths.sum()) + headroom * self.rows
        if not self._indices or (offset := self._segments.allocate(size)) is None:
            return None
        view = View(self._indices.pop(), offset, size, lengths, headroom)
        start = self._place([view.index], [offset], lengths[None], headroom)
        for part in parts:
            self._scatter(start, part.lengths, part.slots)
            start += part.lengths
        return view

    def close(self, view: View) -> None:
        self._segments.free(view.offset, view.size)
        self._indices.append(view.index)

    def grow(self, view: View, headroom: int) -> bool:
        """Move a view to a segment with more ``headroom``; False when the arena is full.

        Prepared entries must have been shown: they are not moved.
        """
        assert view.prepared == 0
        lengths = view.lengths + view.grown
        size = int(lengths.sum()) + headroom * self.rows
        offset = self._segments.allocate(size)
        if offset is None:
            return False
        uniform = view.uniform_length
        if uniform is not None:
            slots = self._block(view.offset, view.size // self.rows, uniform, self.rows)
        else:
            slots = self.arena[_flat_index(self.start[view.index], lengths)]
        start = self._place([view.index], [offset], lengths[None], headroom)
        self._scatter(start, lengths, slots)
        self._segments.free(view.offset, view.size)
        view.offset, view.size, view.headroom = offset, size, headroom
        return True

    def replace(
        self,
        views: Sequence[View],
        lengths: Sequence[NDArray[np.int64]],
        slots: Sequence[Tensor],
        headroom: int,
    ) -> list[bool]:
        """Show other lists (``slots`` row after row, ``lengths`` per row); False where full.

        All are written together: a view for itself takes about fifteen launches.
        """
        shown = [self._move(*one, headroom) for one in zip(views, lengths, strict=True)]
        done = [i for i, fits in enumerate(shown) if fits]
        for part in bounded([slots[i].numel() for i in done], WRITTEN_AT_ONCE):
            some = done[part]
            moved, sizes = [views[i] for i in some], np.stack([lengths[i] for i in some])
            self._scatter(
                self._place([v.index for v in moved], [v.offset for v in moved], sizes, headroom),
                sizes.ravel(),
                joined([slots[i] for i in some]),
            )
        return shown

    def _move(self, view: View, lengths: NDArray[np.int64], headroom: int) -> bool:
        """Give a view another segment, whose lists are still to be written.

        What others were shown until now may lie there: steps that read it were launched before.
        """
        size = int(lengths.sum()) + headroom * self.rows
        offset = self._segments.allocate(size)
        if offset is None:
            return False
        self._segments.free(view.offset, view.size)
        view.offset, view.size, view.lengths = offset, size, lengths
        view.headroom, view.grown, view.prepared = headroom, 0, 0
        return True

    def prepare(self, view: View, slots: Tensor) -> None:
        """Write ``slots`` (int32 ``[rows, n]``) behind every list without showing them yet."""
        count = slots.shape[1]
        if count > view.headroom - view.prepared:
            raise ValueError(f"{count} entries do not fit a headroom of {view.headroom}")
        uniform = view.uniform_length
        if uniform is not None:
            begin = view.offset + uniform + view.prepared
            self._block(begin, view.size // self.rows, count, self.rows).copy_(slots)
        else:
            tail = self.start[view.index] + self.length[view.index] + view.prepared
            steps = torch.arange(count, device=self.arena.device)
            self.arena[tail[:, None] + steps] = slots
        view.prepared += count

    def advance(self, views: Sequence[View], indices: Tensor | int, count: int) -> None:
        """Show the next ``count`` prepared entries of each view (``indices``: their rows).

        One view's row may be a number, which need not be uploaded.
        """
        self.length[indices] += count
        self.note_advance(views, count)

    def note_advance(self, views: Sequence[View], count: int) -> None:
        """The host's half of ``advance``, for a captured graph that does the device's."""
        for view in views:
            view.grown += count
            view.prepared -= count
            view.headroom -= count

    def lists(self, indices: Tensor) -> SlotLists:
        """Lists of the requests at ``indices`` (int64 ``[B]``), as attention takes them."""
        shape = (len(indices), self.num_layers, self.num_kv_heads)
        return SlotLists(
            arena=self.arena,
            start=self.start[indices].view(shape),
            length=self.length[indices].view(shape),
        )

    def last_slots(self, lists: SlotLists) -> Tensor:
        """The slot at the end of every list: int32 ``[B, L, Hkv]``."""
        return self.arena[lists.start + (lists.length - 1)]

    def _place(
        self,
        indices: Sequence[int],
        offsets: Sequence[int],
        lengths: NDArray[np.int64],
        headroom: int,
    ) -> NDArray[np.int64]:
        """Set where each row's list of some views starts and how long it is (``[views, rows]``).

        Returns
        -------
        The starts, flat.
        """
        start = np.zeros_like(lengths)
        np.cumsum(lengths[:, :-1] + headroom, axis=1, out=start[:, 1:])
        start += np.array(offsets)[:, None]
        places = upload(torch.tensor(indices), self.arena.device)
        both = upload(torch.from_numpy(np.stack([start, lengths])), self.arena.device)
        self.start.index_copy_(0, places, both[0])
        self.length.index_copy_(0, places, both[1].int())
        return start.ravel()

    def _scatter(self, start: NDArray[np.int64], lengths: NDArray[np.int64], slots: Tensor) -> None:
        gaps = np.diff(start)
        if (lengths == lengths[0]).all() and (gaps == gaps[:1]).all():
            gap = int(gaps[0]) if len(gaps) else 0
            block = self._block(int(start[0]), gap, int(lengths[0]), len(lengths))
            block.copy_(slots.view(block.shape))
        else:
            begin = upload(torch.from_numpy(start), self.arena.device)
            self.arena[_flat_index(begin, lengths)] = slots

    def _block(self, begin: int, gap: int, count: int, rows: int) -> Tensor:
        """``count`` entries of each of ``rows`` that lie ``gap`` apart: ``[rows, count]``.

        Copying such a block takes no index per entry, which is most of the time of writing lists.
        """
        return self.arena.as_strided((rows, count), (gap, 1), begin)


def _flat_index(start: Tensor, lengths: NDArray[np.int64]) -> Tensor:
    """Arena indices of all entries of ragged rows, row after row."""
    total = int(lengths.sum())
    shift = upload(torch.from_numpy(lengths.cumsum() - lengths), start.device)
    sizes = upload(torch.from_numpy(lengths), start.device)
    rows = torch.repeat_interleave(start - shift, sizes, output_size=total)
    return rows + torch.arange(total, device=start.device)
