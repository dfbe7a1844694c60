"""New decode views of running requests, and the queries that choose them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import tca_runtime.sparsity.batched_decode as batched_decode
from tca_runtime.attention.base import AttentionShape
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.chooser import RequestSparsity
from tca_runtime.sparsity.policies import create_policy
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.recent_queries import RecentQueries
from tca_runtime.sparsity.refresh import Outdated, refresh
from tca_runtime.sparsity.settings import SparsitySettings

SHAPE = AttentionShape(2, 6, 2, 16, torch.float32, torch.device("cpu"))
TABLE = BudgetTable.uniform(0.4, 2, 2, block=16)
BASE = SparsitySettings(TCAPolicy(), TABLE, TABLE, window=48, min_candidates=32, refresh_probes=4)


def test_the_latest_queries_are_those_of_the_latest_steps() -> None:
    """Requests of different lengths, in changing batches, with a row of padding."""
    dice = np.random.default_rng(0)
    kept = RecentQueries(4, 3, SHAPE)
    ends = {0: 7, 1: 100, 2: 0}
    seen: dict[tuple[int, int, int], torch.Tensor] = {}

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q.flatten(1)

    for _ in range(20):
        views = dice.permutation(3)[: dice.integers(1, 4)].tolist()
        prompt = int(dice.integers(0, 3))
        positions = torch.tensor([*(ends[v] for v in views), 0])
        attend = kept.recording(attention, torch.tensor([*views, 3]), positions)
        for layer in range(2):
            q = torch.randn(len(views) + 1 + prompt, 6, 16)
            assert torch.equal(attend(layer, q, q, q), q.flatten(1))
            seen.update({(v, layer, ends[v]): q[i] for i, v in enumerate(views)})
        for view in views:
            ends[view] += 1
    found = kept.latest([1, 0], [ends[1], ends[0]], 2)
    assert found.shape == (2, 2, 2, 6, 16)
    for i, view in enumerate([1, 0]):
        for layer in range(2):
            for back in (1, 2):
                assert torch.equal(found[i, layer, -back], seen[view, layer, ends[view] - back])
    with pytest.raises(ValueError, match="3 tokens are kept, not of 4"):
        kept.latest([0], [10], 4)


def outdated(settings: list[SparsitySettings], limits: list[float | None]) -> list[Outdated]:
    """Requests of different lengths over slots of their own."""
    lengths = [300 + 37 * i for i in range(len(settings))]
    slots = (torch.randperm(sum(lengths) * SHAPE.rows) + 1).int()
    parts = slots.split([n * SHAPE.rows for n in lengths])
    return [
        Outdated(RequestSparsity(wanted, limit), [HeadSlots.full(0, own.view(SHAPE.rows, -1))], i)
        for i, (wanted, limit, own) in enumerate(zip(settings, limits, parts, strict=True))
    ]


def test_requests_refreshed_together_get_what_each_gets_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    coarse = BudgetTable.uniform(0.3, 2, 2, block=32)
    requests = outdated(
        [
            BASE,
            replace(BASE, decode=BudgetTable.uniform(0.7, 2, 2, block=16)),
            replace(BASE, probes=2),
            replace(BASE, prefill=coarse, decode=coarse),
            replace(BASE, window=10_000),
            replace(BASE, policy=create_policy("snapkv")),
            replace(BASE, first_refresh=1),
        ],
        [None, None, None, 0.2, None, None, None],
    )
    total = sum(part.num_slots for one in requests for part in one.parts)
    pools = []
    for _ in range(2):
        pools.append(SlotPool(total + 1, 16, torch.float32, torch.device("cpu")))
    pools[0].kv.normal_()
    pools[1].kv.copy_(pools[0].kv)
    kept = RecentQueries(len(requests), 4, SHAPE)
    kept._rings.normal_()
    # Fewer entries than all requests have: several runs.
    monkeypatch.setattr(batched_decode, "ENTRIES_AT_ONCE", 3000)
    together = refresh(requests, kept, SHAPE, pools[0], batched=True)
    alone = refresh(requests, kept, SHAPE, pools[1], batched=False)
    assert [view is None for view in together] == [i == 4 for i in range(len(requests))]
    for left, right in zip(together, alone, strict=True):
        if left is None or right is None:
            assert left is right
            continue
        assert torch.equal(left.slots, right.slots) and left.num_tokens == right.num_tokens
        assert left.lengths.tolist() == right.lengths.tolist()
        assert left.report == right.report
        assert float(left.dropped_mass) == pytest.approx(float(right.dropped_mass))
    probes = [view.report["probes"] for view in together if view is not None]
    assert probes == [4, 4, 2, 4, 4, 1]
    torch.testing.assert_close(pools[0].importance, pools[1].importance)
