"""Budgets are a pure, monotone function of configuration and length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tca_runtime.sparsity.budget import BudgetTable, levels, proportions

tables = st.builds(
    lambda mu, sigma, block: BudgetTable(np.array([mu]), np.array([sigma]), block),
    st.lists(st.floats(-5, 10), min_size=3, max_size=3),
    st.lists(st.floats(0.2, 5), min_size=3, max_size=3),
    st.sampled_from([1, 4, 64]),
)


def ks_by_rank(table: BudgetTable, num_blocks: int) -> np.ndarray:
    """Tokens kept by the block of each rank: ``[heads, blocks]``."""
    counts = table.level_counts(num_blocks)[0]
    return np.stack([np.repeat(levels(table.block), row) for row in counts])


@given(tables, st.integers(0, 500))
def test_counts_cover_all_blocks(table: BudgetTable, num_blocks: int) -> None:
    counts = table.level_counts(num_blocks)
    assert (counts >= 0).all()
    assert (counts.sum(axis=-1) == num_blocks).all()
    kept = table.kept_tokens(num_blocks)
    assert (kept == ks_by_rank(table, num_blocks).sum(axis=-1)).all()


@given(tables, st.integers(1, 300), st.floats(0, 5))
def test_a_larger_shift_keeps_a_superset(table: BudgetTable, blocks: int, delta: float) -> None:
    assert (ks_by_rank(table.shifted(delta), blocks) >= ks_by_rank(table, blocks)).all()


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.39, 0.75, 0.99])
def test_uniform_reaches_its_ratio(ratio: float) -> None:
    table = BudgetTable.uniform(ratio, 3, 2)
    assert np.allclose(table.keep_ratio, ratio, atol=1e-6)
    assert np.allclose(table.kept_tokens(2000) / (2000 * 64), ratio, atol=2e-3)


def test_ratio_one_keeps_everything_at_every_length() -> None:
    table = BudgetTable.uniform(1.0, 2, 2)
    for blocks in (0, 1, 7, 999):
        assert (table.kept_tokens(blocks) == 64 * blocks).all()


def test_ragged_table_moves_to_an_average_ratio_and_keeps_its_order() -> None:
    table = BudgetTable(np.array([[0.0, 2.0], [4.0, np.inf]]), np.full((2, 2), 1.5), 64)
    moved = table.at_ratio(0.3)
    assert moved.keep_ratio.mean() == pytest.approx(0.3, abs=1e-6)
    order = moved.keep_ratio.ravel()
    assert (np.diff(order) > 0).all()


def test_proportions_follow_the_paper() -> None:
    shares = proportions(np.array(2.0), np.array(1.0), 8)
    expected = np.exp(-((np.arange(4) - 2.0) ** 2) / 2)
    assert np.allclose(shares, expected / expected.sum())


@pytest.mark.parametrize("ratio", [0.0, 0.001, 1.1, -1.0])
def test_impossible_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="kept ratio"):
        BudgetTable.uniform(ratio, 1, 1)


def test_block_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        levels(48)
