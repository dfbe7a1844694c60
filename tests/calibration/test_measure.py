"""What calibration measures equals what selection would do, configuration by configuration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tca_runtime.attention.base import AttentionShape
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.calibration.grid import Grid
from tca_runtime.calibration.observer import (
    DECODE_QUERIES,
    OUTPUT_QUERIES,
    PHASES,
    PREFILL_QUERIES,
    ChunkObserver,
    Totals,
)
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.chooser import layer_lists
from tca_runtime.sparsity.layout import Layout
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.selection import LayerScores, select
from tca_runtime.sparsity.settings import SparsitySettings

LAYERS, HEADS, GROUP, DIM, HIDDEN, BLOCK = 2, 2, 3, 16, 20, 8
TOKENS, CHUNK = 243, 70
SHAPE = AttentionShape(LAYERS, HEADS * GROUP, HEADS, DIM, torch.float32, torch.device("cpu"))


class Case:
    """A context in scattered slots, the queries of its last chunk, and what was observed."""

    def __init__(self, seed: int, probes: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        rows = LAYERS * HEADS
        self.kv = torch.randn(rows * TOKENS + 5, 2, DIM, generator=rng)
        slots = torch.randperm(rows * TOKENS + 5, generator=rng)[: rows * TOKENS]
        self.lists = HeadSlots.full(0, slots.int().view(rows, TOKENS))
        # Large queries make attention pick few tokens, as real heads do.
        self.q = 2.5 * torch.randn(LAYERS, CHUNK, HEADS * GROUP, DIM, generator=rng)
        self.projections = list(torch.randn(LAYERS, HEADS * GROUP * DIM, HIDDEN, generator=rng))
        whole = BudgetTable.uniform(1.0, LAYERS, HEADS, BLOCK)
        self.settings = SparsitySettings(
            TCAPolicy(), whole, whole, window=21, probes=probes, min_candidates=16
        )
        self.grid = Grid.build(BLOCK)
        self.totals = Totals.zeros(LAYERS, HEADS, self.grid)
        observer = ChunkObserver(
            SHAPE,
            self.kv,
            self.lists,
            CHUNK,
            self.settings,
            self.grid,
            self.projections,
            self.totals,
        )
        for layer in range(LAYERS):
            assert observer(layer, 0, self.q[layer]) is None

    def selected(self, phase: str, layer: int, config: int) -> torch.Tensor:
        """What the runtime would attend to under one configuration: bool ``[Hkv, TOKENS]``."""
        rows = slice(layer * HEADS, (layer + 1) * HEADS)
        later = 0 if phase == "prefill" else DECODE_QUERIES
        lists = self.lists.split(TOKENS - later)[0]
        asked = self.settings
        count = asked.num_prefill_probes if phase == "prefill" else asked.probes
        probes = self.q[layer, CHUNK - later - count : CHUNK - later]
        scores = LayerScores.measure(probes, self.kv, layer_lists(lists, rows), SHAPE.scale)
        past = TOKENS - CHUNK if phase == "prefill" else TOKENS - later
        layout = Layout.of([lists], self.settings.num_candidates(past), BLOCK)
        index = scores.index(layout, rows)
        candidates = scores.candidates(index, self.kv, BLOCK, SHAPE.scale)
        one = np.ones((LAYERS, HEADS))
        table = BudgetTable(self.grid.mu[config] * one, self.grid.sigma[config] * one, BLOCK)
        keep = select(TCAPolicy(), candidates, index, scores.lists, table, rows).keep
        # What comes after the choice is seen in any case.
        return torch.nn.functional.pad(keep.view(HEADS, -1), (0, later), value=True)

    def brute_force(
        self, phase: str, layer: int, keep: torch.Tensor
    ) -> tuple[list[float], list[float]]:
        """Retained mass and relative output error per head, query by query."""
        first, count = (0, PREFILL_QUERIES)
        if phase == "decode":
            first, count = CHUNK - DECODE_QUERIES, DECODE_QUERIES
        queries = np.linspace(first, CHUNK - 1, count).round().astype(int)
        compared = set(queries[:: count // OUTPUT_QUERIES].tolist())
        slots = self.lists.slots.view(LAYERS, HEADS, TOKENS)[layer].long()
        projection = self.projections[layer].double().view(HEADS, GROUP * DIM, HIDDEN)
        mass, error, whole = np.zeros(HEADS), np.zeros(HEADS), 0.0
        for query in queries.tolist():
            seen = TOKENS - CHUNK + query + 1
            output = torch.zeros(HIDDEN, dtype=torch.float64)
            for head in range(HEADS):
                keys, values = self.kv[slots[head, :seen]].double().unbind(1)
                mine = self.q[layer, query, head * GROUP : (head + 1) * GROUP].double()
                logits = mine @ keys.T / DIM**0.5
                kept = keep[head, :seen]
                full, sparse = logits.softmax(-1), logits.masked_fill(~kept, -torch.inf).softmax(-1)
                mass[head] += float((full * kept).sum(-1).mean()) / len(queries)
                moved = ((full - sparse) @ values).flatten() @ projection[head]
                error[head] += float(moved.square().sum()) if query in compared else 0.0
                output += (full @ values).flatten() @ projection[head]
            whole += float(output.square().sum()) if query in compared else 0.0
        return mass.tolist(), (error / whole).tolist()


@pytest.mark.parametrize(("seed", "probes"), [(0, 32), (1, 1), (2, 9)])
@pytest.mark.parametrize("phase", PHASES)
def test_sums_equal_selecting_with_each_configuration(seed: int, probes: int, phase: str) -> None:
    case = Case(seed, probes)
    place = PHASES.index(phase)
    assert case.totals.chunks.tolist() == [1, 1]
    for config in (0, 13, 38, 55, 70, 99, case.grid.size - 1):
        for layer in range(LAYERS):
            keep = case.selected(phase, layer, config)
            mass, error = case.brute_force(phase, layer, keep)
            np.testing.assert_allclose(case.totals.mass[place, layer, :, config], mass, atol=2e-6)
            np.testing.assert_allclose(
                case.totals.error[place, layer, :, config], error, rtol=2e-4, atol=1e-9
            )


def test_everything_loses_nothing_and_less_keeps_less() -> None:
    totals = Case(3, 32).totals
    assert (totals.mass[..., -1] == 1).all()
    assert (totals.error[..., -1] < 1e-10).all()
    # The cheapest configurations are far from harmless here, or nothing was measured.
    assert (totals.mass[..., 0] < 0.9).all()
    assert (totals.error[..., 0] > 1e-3).all()
    # Within one shape, a larger ratio keeps a superset.
    for shape in range(4):
        assert (np.diff(totals.mass[..., shape:-1:4], axis=-1) >= -1e-6).all()


def test_short_past_is_not_measured() -> None:
    grid = Grid.build(BLOCK)
    totals = Totals.zeros(1, 1, grid)
    whole = BudgetTable.uniform(1.0, 1, 1, BLOCK)
    settings = SparsitySettings(TCAPolicy(), whole, whole, window=16, min_candidates=32)
    lists = HeadSlots.full(0, torch.arange(70, dtype=torch.int32)[None])
    shape = AttentionShape(1, 1, 1, DIM, torch.float32, torch.device("cpu"))
    ChunkObserver(shape, torch.zeros(70, 2, DIM), lists, 25, settings, grid, [], totals)
    assert totals.chunks.tolist() == [0, 1]


@pytest.mark.parametrize("block", [8, 64])
def test_grid_is_sorted_and_reaches_its_ratios(block: int) -> None:
    grid = Grid.build(block)
    assert (np.diff(grid.ratio) >= 0).all()
    table = BudgetTable(grid.mu[None], grid.sigma[None], block)
    np.testing.assert_allclose(table.keep_ratio[0], grid.ratio, atol=1e-6)
    for blocks in (1, 77, 2000):
        assert table.kept_tokens(blocks)[0, -1] == blocks * block
