"""Splits and joins of per-head slot lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tca_runtime.cache.head_slots import HeadSlots


@st.composite
def ragged(draw: st.DrawFn) -> HeadSlots:
    begin = draw(st.integers(0, 20))
    tokens = draw(st.integers(1, 12))
    keep = draw(
        st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=1, max_size=4)
    )
    mask = np.array(keep)
    positions = np.concatenate([np.flatnonzero(row) for row in mask]) + begin
    slots = np.arange(100, 100 + len(positions))
    return HeadSlots(
        begin,
        begin + tokens,
        mask.sum(axis=1).astype(np.int64),
        torch.from_numpy(slots.astype(np.int32)),
        torch.from_numpy(positions.astype(np.int32)),
    )


def rows(value: HeadSlots) -> list[list[tuple[int, int]]]:
    return [
        list(zip(positions.tolist(), slots.tolist(), strict=True))
        for positions, slots in value.split_rows()
    ]


@given(value=ragged(), data=st.data())
def test_split_then_concat_is_identity(value: HeadSlots, data: st.DataObject) -> None:
    cut = data.draw(st.integers(value.begin, value.end))
    head, tail = value.split(cut)
    assert all(position < cut for row in rows(head) for position, _ in row)
    assert all(position >= cut for row in rows(tail) for position, _ in row)
    joined = HeadSlots.concat([head, tail])
    assert (joined.begin, joined.end) == (value.begin, value.end)
    assert rows(joined) == rows(value)
    assert joined.lengths.tolist() == value.lengths.tolist()


def test_full_split_matches_ragged_split() -> None:
    value = HeadSlots.full(3, torch.arange(1, 13, dtype=torch.int32).view(2, 6))
    head, tail = value.split(5)
    assert rows(head) == [[(3, 1), (4, 2)], [(3, 7), (4, 8)]]
    assert rows(tail)[1] == [(5, 9), (6, 10), (7, 11), (8, 12)]
    assert head.is_full and tail.is_full


@pytest.mark.parametrize("cut", [1, 5])
def test_lists_have_no_strides(cut: int) -> None:
    """Kernels read lists as they lie in memory. One token's column of a table would have a stride,
    which indexing on a CPU follows and a GPU kernel does not."""
    value = HeadSlots.full(0, torch.arange(1, 13, dtype=torch.int32).view(2, 6))
    for part in value.split(cut):
        assert part.slots.is_contiguous() and part.positions.is_contiguous()


def test_runs_that_do_not_meet_are_refused() -> None:
    one = HeadSlots.full(0, torch.ones(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="do not meet"):
        HeadSlots.concat([one, one])
    with pytest.raises(ValueError, match="cannot split"):
        one.split(3)
