"""Every head gets what its objective says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tca_runtime.calibration.choose import Goal
from tca_runtime.calibration.grid import Grid
from tca_runtime.calibration.objective import cheapest, least_error
from tca_runtime.calibration.observer import Totals

SMALL = Grid(np.zeros(5), np.ones(5), np.array([0.1, 0.1, 0.3, 0.6, 1.0]), 64)


def random_totals(seed: int, grid: Grid, layers: int = 3, heads: int = 2) -> Totals:
    rng = np.random.default_rng(seed)
    shape = (2, layers, heads, grid.size)
    mass = np.sort(rng.random(shape), axis=-1)
    error = -np.sort(-rng.random(shape), axis=-1)
    mass[..., -1], error[..., -1] = 1.0, 0.0
    return Totals(4 * mass, 4 * error, np.array([4, 4]))


@pytest.mark.parametrize(
    ("threshold", "floor", "expected"),
    [
        (0.5, 0.0, [1, 2]),
        (0.85, 0.0, [2, 3]),
        (0.95, 0.0, [4, 3]),
        (0.5, 0.4, [3, 3]),
        (1.0, 0.0, [4, 4]),
    ],
)
def test_cheapest_that_retains_enough(threshold: float, floor: float, expected: list[int]) -> None:
    mass = np.array([[0.6, 0.7, 0.9, 0.92, 1.0], [0.1, 0.2, 0.8, 0.99, 1.0]])
    assert cheapest(mass, SMALL, threshold, floor).tolist() == expected


def test_everything_is_taken_even_if_rounding_left_it_below_the_threshold() -> None:
    assert cheapest(np.full((1, 5), 0.5), SMALL, 0.9, 0.0).tolist() == [4]


def test_least_error_beats_every_affordable_combination_on_the_hull() -> None:
    """With convex errors the priced choice is optimal for the budget that it spends."""
    grid = Grid(np.zeros(4), np.ones(4), np.array([0.1, 0.3, 0.6, 1.0]), 64)
    error = np.array([[1.0, 0.2, 0.05, 0.0], [0.3, 0.2, 0.1, 0.0], [9.0, 4.0, 1.0, 0.0]])
    for ratio in (0.15, 0.3, 0.5, 0.9):
        choice = least_error(error, grid, ratio, 0.0)
        spent = grid.ratio[choice].mean()
        assert spent <= ratio + 1e-12
        found = sum(error[head, config] for head, config in enumerate(choice))
        for other in itertools.product(range(4), repeat=3):
            if grid.ratio[list(other)].mean() <= spent + 1e-12:
                assert found <= sum(error[h, c] for h, c in enumerate(other)) + 1e-12


def test_the_head_that_matters_gets_the_budget() -> None:
    grid = Grid.build(64)
    error = np.stack([1e-6 * (1 - grid.ratio), 1e3 * (1 - grid.ratio) ** 2])
    choice = least_error(error, grid, 0.3, 0.05)
    assert grid.ratio[choice[0]] < 0.06 < 0.4 < grid.ratio[choice[1]]
    assert grid.ratio[choice].min() >= 0.05


def test_floor_above_the_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0.5 of every head and 0.3 on average"):
        least_error(np.zeros((2, 5)), SMALL, 0.3, 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_kept_grows_with_the_threshold(seed: int) -> None:
    grid = Grid.build(64)
    totals = random_totals(seed, grid)
    taken = [grid.ratio[Goal(t).choose(totals, grid, 1)] for t in (0.2, 0.6, 0.8, 0.9, 0.95, 1.0)]
    for less, more in itertools.pairwise(taken):
        assert (less <= more).all()
    assert (taken[-1] == 1).all()
    assert (taken[0] < taken[-2]).any()


@pytest.mark.parametrize("seed", range(5))
def test_output_error_spends_no_more_and_errs_no_more_than_mass(seed: int) -> None:
    grid = Grid.build(64)
    totals = random_totals(seed, grid, layers=20, heads=8)
    by_mass = Goal(0.8).choose(totals, grid, 0)
    by_error = Goal(0.8, "output-error").choose(totals, grid, 0)
    assert grid.ratio[by_error].mean() <= grid.ratio[by_mass].mean()

    def total_error(choice: np.ndarray) -> float:
        return float(np.take_along_axis(totals.error[0], choice[..., None], -1).sum())

    assert total_error(by_error) < total_error(by_mass)


def test_ratios_of_the_phases_differ() -> None:
    grid = Grid.build(64)
    totals = random_totals(0, grid, layers=20, heads=8)
    goal = Goal(0.9, "output-error", ratios=(0.2, 0.5))
    for phase, wanted in enumerate((0.2, 0.5)):
        assert wanted - 0.02 < grid.ratio[goal.choose(totals, grid, phase)].mean() <= wanted
