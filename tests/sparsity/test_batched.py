"""Batched selection against the layer-by-layer one, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tca_runtime.attention.base import AttentionShape
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.sparsity.batched import BatchedSelection
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.chooser import ChunkSelection, RequestSparsity, StepSelection
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.settings import SparsitySettings

SHAPE = AttentionShape(2, 6, 2, 16, torch.float32, torch.device("cpu"))


def table(ratio: float, block: int = 16) -> BudgetTable:
    spread = np.array([[0.0, 1.0], [-0.7, 0.4]])
    return BudgetTable(spread, np.full((2, 2), 2.0), block).at_ratio(ratio)


def settings(**changes: object) -> SparsitySettings:
    base = SparsitySettings(
        TCAPolicy(), table(0.2), table(0.4), window=48, probes=8, min_candidates=32
    )
    return replace(base, **changes)


def select_both(
    wanted: SparsitySettings, past: int, size: int, last: bool, token_start: int = 3
) -> tuple[StepSelection, BatchedSelection, torch.Tensor, HeadSlots]:
    """Both choosers over one request, with pools of their own importance."""
    torch.manual_seed(past + size)
    total = past + size
    pools = []
    for _ in range(2):
        pool = SlotPool(total * SHAPE.rows + 1, 16, torch.float32, torch.device("cpu"))
        pools.append(pool)
    pools[0].kv.normal_()
    pools[1].kv.copy_(pools[0].kv)
    slots = (torch.randperm(total * SHAPE.rows) + 1).int().view(SHAPE.rows, total)
    parts = [
        HeadSlots.full(0, slots[:, : past // 2]),
        HeadSlots.full(past // 2, slots[:, past // 2 :]),
    ]
    work = ChunkSelection.plan(RequestSparsity(wanted), parts, size, last)
    assert work is not None
    again = ChunkSelection.plan(RequestSparsity(wanted), parts, size, last)
    assert BatchedSelection.covers([again])
    q = torch.randn(token_start + size, 6, 16)
    one = StepSelection(SHAPE, pools[0], [work])
    many = BatchedSelection(SHAPE, pools[1], [again], [token_start])
    return one, many, q, HeadSlots.concat(parts)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["raw-hhi", "normalised-hhi", "mass"])
@pytest.mark.parametrize("direction", ["many", "few"])
def test_one_piece_equals_the_layer_by_layer_choice(last: bool, kind: str, direction: str) -> None:
    wanted = settings(policy=TCAPolicy(kind, direction))
    one, many, q, lists = select_both(wanted, 400, 100, last)
    assert list(many.pieces) == [(3, 100)]
    for layer in range(2):
        view = one(layer, 0, q[3:])
        views = many(layer, q)
        assert view is not None
        own = lists.dense()[2 * layer : 2 * layer + 2, 400:]
        expected = [torch.cat(pair) for pair in zip(view.per_head(), own, strict=True)]
        assert torch.equal(views.slots, torch.cat(expected))
        assert views.lengths.tolist() == [(view.lengths + 100).tolist()]
    left, right = one.decode_view(0), many.decode_view(0)
    assert (left is None) == (right is None) == (not last)
    if left is not None and right is not None:
        assert torch.equal(left.slots, right.slots)
        assert torch.equal(left.keep, right.keep)
        assert left.lengths.tolist() == right.lengths.tolist()
        assert left.report["kept_ratio"] == right.report["kept_ratio"]
        assert float(left.dropped_mass) == pytest.approx(float(right.dropped_mass))
        assert torch.equal(one._pool.importance, many._chunks[0]._pool.importance)


def test_pieces_of_a_chunk_choose_as_chunks_of_their_own_would() -> None:
    wanted = settings(granularity=50)
    _, many, q, lists = select_both(wanted, 300, 150, True)
    assert list(many.pieces) == [(3, 50), (53, 50), (103, 50)]
    together = many(0, q)
    ends = np.cumsum(together.lengths.sum(axis=1))
    pieces = together.slots.split(np.diff(ends, prepend=0).tolist())
    pool = many._chunks[0]._pool
    for i, piece in enumerate(pieces):
        upto = HeadSlots.full(0, lists.dense()[:, : 350 + 50 * i])
        work = ChunkSelection.plan(RequestSparsity(wanted), [upto], 50, False)
        alone = BatchedSelection(SHAPE, pool, [work], [0])
        assert torch.equal(alone(0, q[3 + 50 * i : 53 + 50 * i]).slots, piece)


def test_one_shot_selects_the_decode_view_alone() -> None:
    wanted = settings(one_shot=True, granularity=50)
    one, many, q, lists = select_both(wanted, 300, 150, True)
    ends = [350, 400, 450]
    for layer in range(2):
        everything = one(layer, 0, q[3:])
        assert everything is not None and everything.lengths.tolist() == [300, 300]
        seen = many(layer, q)
        assert seen.lengths.tolist() == [[end, end] for end in ends]
        rows = lists.dense()[2 * layer : 2 * layer + 2]
        assert torch.equal(seen.slots, torch.cat([row[:end] for end in ends for row in rows]))
    left, right = one.decode_view(0), many.decode_view(0)
    assert left is not None and right is not None
    assert torch.equal(left.slots, right.slots)
    assert len(left.slots) < lists.num_slots


def test_mass_limit_takes_the_smallest_rung_that_holds() -> None:
    wanted = settings(prefill=table(0.2, 32), decode=table(0.4, 32))
    one, many, q, _ = select_both(wanted, 600, 64, True)
    for chooser in (one, many):
        work = chooser._chunks[0]
        chunk = work._work if hasattr(work, "_work") else work
        chunk.request = RequestSparsity(wanted, max_dropped_mass=0.2)
    for layer in range(2):
        one(layer, 0, q[3:])
        many(layer, q)
    left, right = one.decode_view(0), many.decode_view(0)
    assert left is not None and right is not None
    assert float(right.dropped_mass) <= 0.2
    assert torch.equal(left.slots, right.slots)
