"""How often a scheduler may be started anew."""

from __future__ import annotations

from tca_runtime.supervisor import RestartBudget


def test_restarts_are_counted_within_the_window() -> None:
    budget = RestartBudget(2, window=10.0)
    assert [budget.spend(t) for t in (0.0, 9.0, 10.0)] == [True, True, False]
    assert [budget.spend(t) for t in (10.5, 11.0)] == [True, False]
    assert budget.spend(21.0)


def test_no_restarts_at_all() -> None:
    assert not RestartBudget(0).spend(0.0)
