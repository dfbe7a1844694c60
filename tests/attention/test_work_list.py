"""FlashInfer's list of work pointed at tokens, on lists like those it makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tca_runtime.attention import work_list

NUM_CTAS, HEADS, GROUP = 4, 3, 2
STARTS = np.array([10, 100])
# As planned for packed rows: two pieces of 5 and 7 tokens, three KV heads each.
Q_LENGTHS, KV_LENGTHS = np.repeat([5, 7], HEADS), np.array([9, 6, 5, 30, 8, 7])


def planned(backend: str = "fa3", one_schedule: int = 0) -> Any:
    """A wrapper whose plan has an entry for each query head of each sequence."""
    sequence, head = (x.ravel() for x in np.meshgrid(np.arange(6), np.arange(GROUP)))
    tables = [
        np.zeros(12),
        (Q_LENGTHS.cumsum() - Q_LENGTHS)[sequence],
        (KV_LENGTHS.cumsum() - KV_LENGTHS)[sequence],
        Q_LENGTHS[sequence],
        KV_LENGTHS[sequence],
        head,
        np.array([0, 3, 6, 9, 12]),
        sequence,
    ]
    # Each begins at a multiple of 16 bytes.
    sizes = np.array([-(-len(t) // 4) * 4 for t in tables])
    offsets = sizes.cumsum() - sizes
    pinned = np.zeros(sizes.sum() + 8, dtype=np.int32)
    for offset, values in zip(offsets, tables, strict=True):
        pinned[offset : offset + len(values)] = values
    return SimpleNamespace(
        _backend=backend,
        _plan_info=[*(4 * offsets).tolist(), one_schedule],
        _pin_memory_int_workspace_buffer=torch.from_numpy(pinned.view(np.uint8)),
        _int_workspace_buffer=torch.zeros(4 * len(pinned), dtype=torch.uint8),
        _qo_indptr_last=36,
        device=torch.device("cpu"),
    )


@pytest.fixture(autouse=True)
def small_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(multi_processor_count=NUM_CTAS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)


def test_entries_reach_their_tokens_heads_and_keys() -> None:
    wrapper = planned()
    q = torch.arange(120 * HEADS * GROUP).view(120, HEADS * GROUP)
    keys = torch.arange(int(KV_LENGTHS.sum()))[:, None]
    assert work_list.point_at_tokens(wrapper, STARTS, HEADS, GROUP, len(q))
    assert wrapper._qo_indptr_last == len(q)
    tables = wrapper._int_workspace_buffer.numpy().view(np.int32)
    read = [tables[offset // 4 : offset // 4 + 12] for offset in wrapper._plan_info[:-1]]
    seen = work_list.by_head(keys, HEADS)
    found = set()
    for row, key_row, count, num_keys, head in zip(*read[1:6], strict=True):
        piece, kv_head = list(STARTS).index(row), head // GROUP
        sequence = piece * HEADS + kv_head
        assert (count, num_keys) == (Q_LENGTHS[sequence], KV_LENGTHS[sequence])
        # What the kernel addresses: rows from its first one on, of its head.
        mine = seen.as_strided((num_keys,), (1,), int(key_row + kv_head))
        first = KV_LENGTHS[:sequence].sum()
        assert mine.tolist() == list(range(first, first + num_keys))
        found.add((row, head))
    assert found == {(s, h) for s in STARTS for h in range(HEADS * GROUP)}


@pytest.mark.parametrize(("backend", "one_schedule"), [("fa2", 0), ("fa3", 1)])
def test_other_plans_are_left_alone(backend: str, one_schedule: int) -> None:
    wrapper = planned(backend, one_schedule)
    assert not work_list.point_at_tokens(wrapper, STARTS, HEADS, GROUP, 120)
    assert wrapper._qo_indptr_last == 36
    assert not wrapper._int_workspace_buffer.any()


def test_a_list_of_another_form_is_left_alone() -> None:
    wrapper = planned()
    pinned = wrapper._pin_memory_int_workspace_buffer.clone()
    assert not work_list.point_at_tokens(wrapper, STARTS, HEADS + 1, GROUP, 120)
    assert not work_list.point_at_tokens(wrapper, STARTS, HEADS, GROUP + 1, 120)
    assert torch.equal(wrapper._pin_memory_int_workspace_buffer, pinned)
    assert not wrapper._int_workspace_buffer.any()


def test_all_heads_see_all_rows_one_behind_the_other() -> None:
    rows = torch.randn(20, 16)
    seen = work_list.by_head(rows, HEADS)
    for head in range(HEADS):
        assert torch.equal(seen[:, head], rows[head : head + 20 - HEADS + 1])
