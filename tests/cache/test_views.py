"""Views that are written together list what each would list by itself."""

from __future__ import annotations

from itertools import count

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import MonkeyPatch
from torch import Tensor

from tca_runtime.cache import views
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.views import View, ViewTable

LAYERS, HEADS, HEADROOM = 2, 2, 3
ROWS = LAYERS * HEADS
row_lengths = st.one_of(
    st.lists(st.integers(0, 9), min_size=ROWS, max_size=ROWS),
    st.integers(0, 9).map(lambda n: [n] * ROWS),
)


def table(capacity: int, numbers: count[int], num_views: int) -> tuple[ViewTable, list[View]]:
    made = ViewTable(num_views, LAYERS, HEADS, capacity, torch.device("cpu"))
    opened = [made.open([HeadSlots.full(0, some(numbers, ROWS).view(ROWS, 1))], HEADROOM)]
    opened += [made.open([], HEADROOM) for _ in range(num_views - 1)]
    return made, [view for view in opened if view is not None]


def some(numbers: count[int], size: int) -> Tensor:
    return torch.tensor([next(numbers) for _ in range(size)], dtype=torch.int32)


def listed(made: ViewTable, view: View) -> list[list[int]]:
    lists = made.lists(torch.tensor([view.index]))
    ends = zip(lists.start.flatten().tolist(), lists.length.flatten().tolist(), strict=True)
    return [made.arena[begin : begin + length].tolist() for begin, length in ends]


@given(
    lengths=st.lists(row_lengths, min_size=1, max_size=4),
    capacity=st.integers(80, 240),
    at_once=st.sampled_from([1, 30, 1000]),
)
def test_as_one_by_one(lengths: list[list[int]], capacity: int, at_once: int) -> None:
    with MonkeyPatch.context() as patch:
        patch.setattr(views, "WRITTEN_AT_ONCE", at_once)
        together, alone = (table(capacity, count(1), len(lengths)) for _ in range(2))
        new = [np.array(one, dtype=np.int64) for one in lengths[: len(together[1])]]
        slots = [some(count(1000 * i), int(one.sum())) for i, one in enumerate(new, start=1)]
        shown = together[0].replace(together[1], new, slots, HEADROOM)
        each = [
            alone[0].replace([alone[1][i]], [new[i]], [slots[i]], HEADROOM) for i in range(len(new))
        ]
    assert shown == [fits for (fits,) in each]
    assert together[0].num_free == alone[0].num_free
    for i, (left, right) in enumerate(zip(together[1], alone[1], strict=True)):
        assert listed(together[0], left) == listed(alone[0], right)
        if shown[i]:
            rows = torch.split(slots[i], new[i].tolist())
            assert listed(together[0], left) == [row.tolist() for row in rows]
