"""Batched selection against the layer-by-layer one, on the CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tca_kernels import dispatch, gather, score, select
from tca_runtime.attention.base import AttentionShape
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.sparsity import batched, batched_decode
from tca_runtime.sparsity.batched import BatchedSelection, covers
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.chooser import ChunkSelection, DecodeView, RequestSparsity, StepSelection
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.settings import SparsitySettings

SHAPE = AttentionShape(2, 6, 2, 16, torch.float32, torch.device("cpu"))


def table(ratio: float, block: int = 16) -> BudgetTable:
    spread = np.array([[0.0, 1.0], [-0.7, 0.4]])
    return BudgetTable(spread, np.full((2, 2), 2.0), block).at_ratio(ratio)


def settings(**changes: object) -> SparsitySettings:
    base = SparsitySettings(
        TCAPolicy(), table(0.2), table(0.4), 48, probes=8, prefill_probes=5, min_candidates=32
    )
    return replace(base, **changes)


def filled_pool(num_slots: int) -> SlotPool:
    pool = SlotPool(num_slots + 1, 16, torch.float32, torch.device("cpu"))
    pool.kv.normal_()
    return pool


def copy_of(pool: SlotPool) -> SlotPool:
    """A pool of the same keys, with an importance of its own."""
    other = SlotPool(len(pool.kv), 16, torch.float32, torch.device("cpu"))
    other.kv.copy_(pool.kv)
    return other


def runs(slots: torch.Tensor) -> list[HeadSlots]:
    """The lists of one request in two runs of tokens."""
    middle = slots.shape[1] // 2
    return [HeadSlots.full(0, slots[:, :middle]), HeadSlots.full(middle, slots[:, middle:])]


@dataclass
class Both:
    """Both choosers over one request, with pools of their own importance."""

    one: StepSelection
    many: BatchedSelection
    q: torch.Tensor
    lists: HeadSlots
    pools: tuple[SlotPool, SlotPool]


def select_both(wanted: RequestSparsity, past: int, size: int, last: bool) -> Both:
    token_start = 3
    torch.manual_seed(past + size)
    total = past + size
    pool = filled_pool(total * SHAPE.rows)
    pools = pool, copy_of(pool)
    parts = runs((torch.randperm(total * SHAPE.rows) + 1).int().view(SHAPE.rows, total))
    work = ChunkSelection.plan(wanted, parts, size, last)
    assert work is not None
    again = ChunkSelection.plan(wanted, parts, size, last)
    assert covers([again])
    q = torch.randn(token_start + size, 6, 16)
    one = StepSelection(SHAPE, pools[0], [work])
    many = BatchedSelection(SHAPE, pools[1], [again], [token_start])
    return Both(one, many, q, HeadSlots.concat(parts), pools)


def equal_views(left: DecodeView | None, right: DecodeView | None) -> bool:
    if left is None or right is None:
        return left is right
    return (
        torch.equal(left.slots, right.slots)
        and left.num_tokens == right.num_tokens
        and left.lengths.tolist() == right.lengths.tolist()
        and left.report == right.report
        and float(left.dropped_mass) == pytest.approx(float(right.dropped_mass))
    )


def attended(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.flatten(1) + layer


def run_layers(chooser: BatchedSelection, q: torch.Tensor) -> None:
    """What a forward pass does beside choosing."""
    attention = chooser.watching(attended)
    for layer in range(2):
        assert torch.equal(attention(layer, q, q, q), q.flatten(1) + layer)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["raw-hhi", "normalised-hhi", "mass"])
@pytest.mark.parametrize("direction", ["many", "few"])
def test_one_piece_equals_the_layer_by_layer_choice(last: bool, kind: str, direction: str) -> None:
    wanted = settings(policy=TCAPolicy(kind, direction))
    both = select_both(RequestSparsity(wanted), 400, 100, last)
    one, many, q, lists = both.one, both.many, both.q, both.lists
    assert list(many.pieces) == [(3, 100)]
    for layer in range(2):
        view = one(layer, 0, q[3:])
        views = many(layer, q)
        assert view is not None
        own = lists.dense()[2 * layer : 2 * layer + 2, 400:]
        expected = [torch.cat(pair) for pair in zip(view.per_head(), own, strict=True)]
        assert torch.equal(views.slots, torch.cat(expected))
        assert views.lengths.tolist() == [(view.lengths + 100).tolist()]
    run_layers(many, q)
    left, right = one.decode_view(0), many.decode_view(0)
    assert (left is None) == (right is None) == (not last)
    assert equal_views(left, right)
    assert torch.equal(both.pools[0].importance, both.pools[1].importance)


def test_pieces_of_a_chunk_choose_as_chunks_of_their_own_would() -> None:
    wanted = settings(granularity=50)
    both = select_both(RequestSparsity(wanted), 300, 150, True)
    many, q, lists, pool = both.many, both.q, both.lists, both.pools[1]
    assert list(many.pieces) == [(3, 50), (53, 50), (103, 50)]
    together = many(0, q)
    ends = np.cumsum(together.lengths.sum(axis=1))
    pieces = together.slots.split(np.diff(ends, prepend=0).tolist())
    for i, piece in enumerate(pieces):
        upto = HeadSlots.full(0, lists.dense()[:, : 350 + 50 * i])
        work = ChunkSelection.plan(RequestSparsity(wanted), [upto], 50, False)
        alone = BatchedSelection(SHAPE, pool, [work], [0])
        assert torch.equal(alone(0, q[3 + 50 * i : 53 + 50 * i]).slots, piece)


@pytest.mark.parametrize("size", [150, 6])
def test_one_shot_selects_the_decode_view_alone(size: int) -> None:
    """Also of a chunk shorter than the probes wanted."""
    wanted = settings(one_shot=True, granularity=200)
    both = select_both(RequestSparsity(wanted), 300, size, True)
    one, many, q, lists = both.one, both.many, both.q, both.lists
    assert not many.chunks and not many.pieces, "attends as in full attention"
    for layer in range(2):
        assert one(layer, 0, q[3:]) is None
    run_layers(many, q)
    left, right = one.decode_view(0), many.decode_view(0)
    assert left is not None and right is not None
    assert equal_views(left, right)
    assert len(left.slots) < lists.num_slots
    assert torch.equal(both.pools[0].importance, both.pools[1].importance)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels on the CPU, interpreted"
)
@pytest.mark.parametrize("granularity", [100, 40])
def test_choosing_uploads_nothing(monkeypatch: pytest.MonkeyPatch, granularity: int) -> None:
    """With the kernels, whose tables of all layers are on the device from the beginning."""
    pytest.importorskip("triton")
    both = select_both(RequestSparsity(settings(granularity=granularity)), 300, 100, False)
    expected = [both.many(layer, both.q) for layer in range(2)]

    def refuse(table: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise AssertionError("an upload in a layer")

    for module in (batched, dispatch, gather, score, select):
        monkeypatch.setattr(module, "upload", refuse)
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
    for layer, lists in enumerate(expected):
        found = both.many(layer, both.q)
        assert torch.equal(found.slots, lists.slots)
        assert found.lengths.tolist() == lists.lengths.tolist()


def test_a_chunk_that_ends_no_prompt_keeps_no_queries() -> None:
    both = select_both(RequestSparsity(settings()), 400, 100, False)
    assert both.many.chunks == frozenset([0])
    assert both.many.watching(attended) is attended


def test_mass_limit_takes_the_smallest_rung_that_holds() -> None:
    wanted = settings(prefill=table(0.2, 32), decode=table(0.4, 32))
    both = select_both(RequestSparsity(wanted, max_dropped_mass=0.2), 600, 64, True)
    one, many, q = both.one, both.many, both.q
    for layer in range(2):
        one(layer, 0, q[3:])
    run_layers(many, q)
    left, right = one.decode_view(0), many.decode_view(0)
    assert left is not None and right is not None
    assert float(right.dropped_mass) <= 0.2
    assert torch.equal(left.slots, right.slots)


@pytest.mark.parametrize("at_once", [1 << 25, 300])
def test_requests_of_a_step_choose_as_each_would_alone(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """First and later chunks, a refresh, other probes, budgets and limits, a shared prefix."""
    torch.manual_seed(5)
    base = settings()
    limited = settings(prefill=table(0.2, 32), decode=table(0.4, 32))
    requests = [
        (RequestSparsity(base), 400, 100, True, False),
        (RequestSparsity(base), 250, 60, False, False),
        (RequestSparsity(settings(decode=table(0.7))), 130, 40, True, False),
        (RequestSparsity(settings(probes=4)), 300, 8, True, True),
        (RequestSparsity(limited, max_dropped_mass=0.2), 320, 50, True, False),
        (RequestSparsity(limited), 320, 50, True, False),
        (RequestSparsity(base), 40, 30, True, False),
        (RequestSparsity(base), 0, 120, True, False),
    ]
    totals = [past + size for _, past, size, _, _ in requests]
    pool = filled_pool(sum(totals) * SHAPE.rows)
    free = (torch.randperm(sum(totals) * SHAPE.rows) + 1).int().split([t * 4 for t in totals])
    slots = [part.view(SHAPE.rows, -1) for part in free]
    slots[2][:, :120] = slots[0][:, :120]

    def planned() -> list[ChunkSelection | None]:
        return [
            ChunkSelection.plan(wanted, runs(own), size, last, sees_past)
            for own, (wanted, _, size, last, sees_past) in zip(slots, requests, strict=True)
        ]

    sizes = [size for _, _, size, _, _ in requests]
    starts = (2 + np.cumsum([0, *sizes[:-1]])).tolist()
    q = torch.randn(2 + sum(sizes), 6, 16)
    pools = [copy_of(pool), copy_of(pool)]
    works = planned()
    assert works.count(None) == 1, "the shortest request has nothing to drop"
    together = BatchedSelection(SHAPE, pools[0], works, starts)
    alone = {
        number: BatchedSelection(SHAPE, pools[1], [work], [start])
        for number, (work, start) in enumerate(zip(planned(), starts, strict=True))
        if work is not None
    }
    assert together.chunks == frozenset(alone) - {3, 7}, "one sees its past whole, one has none"
    by_start = {starts[number]: chooser for number, chooser in alone.items()}
    for chooser in (together, *alone.values()):
        run_layers(chooser, q)
    for layer in range(2):
        found = together(layer, q)
        ends = found.lengths.sum(axis=1).cumsum()
        parts = found.slots.split(np.diff(ends, prepend=0).tolist())
        for (start, size), part, lengths in zip(together.pieces, parts, found.lengths, strict=True):
            expected = by_start[start](layer, q)
            assert by_start[start].pieces == [(start, size)]
            assert torch.equal(expected.slots, part)
            assert expected.lengths.tolist() == [lengths.tolist()]
    expected_views = {number: chooser.decode_view(0) for number, chooser in alone.items()}
    # Fewer entries than one request has: a layer at a time.
    monkeypatch.setattr(batched_decode, "ENTRIES_AT_ONCE", at_once)
    for number in range(len(requests)):
        left = together.decode_view(number)
        right = expected_views.get(number)
        assert (left is None) == (number in (1, 6))
        assert equal_views(left, right)
    assert torch.equal(pools[0].importance, pools[1].importance)
