"""Slot lists of a run of tokens: what a radix node holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_kernels.dispatch import upload


@dataclass(frozen=True)
class HeadSlots:
    """For every (layer, KV head) row, the slots kept of the tokens ``[begin, end)``.

    A CSR matrix whose row lengths live on the host. Lists are ascending in position, the same
    order in every row. A row of length ``end - begin`` is complete.

    Attributes
    ----------
    begin, end : absolute token positions covered
    lengths : int64 ``[rows]``, on the host
    slots : int32 ``[sum(lengths)]``, contiguous, row after row, on the device
    listed : the positions of the slots, alike; None of complete rows, whose positions are known
    """

    begin: int
    end: int
    lengths: NDArray[np.int64]
    slots: Tensor
    listed: Tensor | None = None

    @staticmethod
    def full(begin: int, slots: Tensor) -> HeadSlots:
        """Every token of every row: ``slots`` is int32 ``[rows, tokens]``."""
        rows, tokens = slots.shape
        return HeadSlots(
            begin=begin,
            end=begin + tokens,
            lengths=np.full(rows, tokens, dtype=np.int64),
            # A column of one token would be a view with a stride; kernels read lists in a row.
            slots=slots.reshape(-1).contiguous(),
        )

    @staticmethod
    def nothing() -> HeadSlots:
        """No tokens and no rows: what a root holds."""
        return HeadSlots(0, 0, np.zeros(0, np.int64), torch.empty(0, dtype=torch.int32))

    @staticmethod
    def concat(parts: Sequence[HeadSlots]) -> HeadSlots:
        """Join runs of tokens that follow one another."""
        if len(parts) == 1:
            return parts[0]
        for left, right in zip(parts, parts[1:], strict=False):
            if left.end != right.begin:
                raise ValueError(f"runs do not meet: {left.end} != {right.begin}")
        lengths = np.sum([p.lengths for p in parts], axis=0)
        if all(p.is_full for p in parts):
            slots = torch.cat([p.dense() for p in parts], dim=1)
            return HeadSlots.full(parts[0].begin, slots)
        pieces = [p.split_rows() for p in parts]
        order = [piece for row in zip(*pieces, strict=True) for piece in row]
        return HeadSlots(
            begin=parts[0].begin,
            end=parts[-1].end,
            lengths=lengths,
            slots=torch.cat([slots for _, slots in order]),
            listed=torch.cat([positions for positions, _ in order]),
        )

    @staticmethod
    def merge(left: HeadSlots, right: HeadSlots) -> HeadSlots:
        """Union of disjoint lists over the same tokens, on the device of ``left``."""
        device = left.slots.device
        positions = torch.cat([left.positions, right.positions.to(device)])
        rows = torch.cat([_row_of(p.lengths, device) for p in (left, right)])
        slots = torch.cat([left.slots, right.slots.to(device)])
        if len(slots) == left.num_tokens * len(left.lengths):
            # Nothing is missing, so every entry's place is known without sorting.
            dense = torch.empty_like(slots)
            dense[rows * left.num_tokens + (positions - left.begin)] = slots
            return HeadSlots.full(left.begin, dense.view(len(left.lengths), -1))
        # One integer orders by row, then position.
        key = (rows << 32) + positions
        order = key.argsort()
        return HeadSlots(
            left.begin, left.end, left.lengths + right.lengths, slots[order], positions[order]
        )

    @property
    def positions(self) -> Tensor:
        """Of the slots: int32 ``[sum(lengths)]``, contiguous."""
        if self.listed is not None:
            return self.listed
        device = self.slots.device
        tokens = torch.arange(self.begin, self.end, dtype=torch.int32, device=device)
        return tokens.repeat(len(self.lengths))

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin

    @property
    def num_slots(self) -> int:
        return int(self.slots.numel())

    @property
    def is_full(self) -> bool:
        """Every row holds every token."""
        return self.num_slots == self.num_tokens * len(self.lengths)

    @property
    def indptr(self) -> NDArray[np.int64]:
        """Row offsets, ``[rows + 1]``."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def dense(self) -> Tensor:
        """The slots as ``[rows, tokens]``; only for complete rows."""
        return self.slots.view(len(self.lengths), self.num_tokens)

    def split_rows(self) -> list[tuple[Tensor, Tensor]]:
        """(positions, slots) of each row, as views."""
        sizes = self.lengths.tolist()
        return list(
            zip(torch.split(self.positions, sizes), torch.split(self.slots, sizes), strict=True)
        )

    def split(self, position: int) -> tuple[HeadSlots, HeadSlots]:
        """Cut into the tokens before ``position`` and the rest.

        Complete rows are cut from host knowledge. Pruned ones read positions from the device.
        """
        if not self.begin <= position <= self.end:
            raise ValueError(f"cannot split [{self.begin}, {self.end}) at {position}")
        if self.is_full:
            slots, cut = self.dense(), position - self.begin
            before, after = slots[:, :cut], slots[:, cut:]
            # The usual cut takes everything, of which nothing need be copied then.
            if position == self.end:
                return self, HeadSlots.full(position, after)
            if position == self.begin:
                return HeadSlots.full(position, before), self
            return HeadSlots.full(self.begin, before), HeadSlots.full(position, after)
        head, tail = self.partition(self.positions < position)
        return (
            replace(head, end=position),
            replace(tail, begin=position),
        )

    def partition(self, chosen: Tensor) -> tuple[HeadSlots, HeadSlots]:
        """The entries where ``chosen`` (bool ``[num_slots]``) holds, and the others.

        Reads the counts from the device.
        """
        ends = torch.from_numpy(self.lengths.cumsum()).to(chosen.device)
        before = torch.nn.functional.pad(chosen.cumsum(0), (1, 0))
        counts = before[ends].diff(prepend=before[:1]).cpu().numpy()
        positions = self.positions

        def part(lengths: NDArray[np.int64], inside: Tensor) -> HeadSlots:
            listed = None if (lengths == self.num_tokens).all() else positions[inside]
            return HeadSlots(self.begin, self.end, lengths, self.slots[inside], listed)

        return part(counts, chosen), part(self.lengths - counts, ~chosen)

    def with_slots(self, slots: Tensor) -> HeadSlots:
        """The same tokens in other slots, listed in the same order."""
        listed = None if self.listed is None else self.listed.to(slots.device)
        return replace(self, slots=slots, listed=listed)


def _row_of(lengths: NDArray[np.int64], device: torch.device) -> Tensor:
    """The row of every entry: int64 ``[sum(lengths)]``."""
    sizes = upload(torch.from_numpy(lengths), device)
    rows = torch.arange(len(lengths), device=device)
    return torch.repeat_interleave(rows, sizes, output_size=int(lengths.sum()))
