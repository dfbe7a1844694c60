"""Some seconds of chaos; ``python -m benchmark.chaos`` runs for longer."""

from __future__ import annotations

import pytest

from benchmark.chaos.__main__ import main

pytestmark = pytest.mark.slow


def test_pressure_and_rude_clients() -> None:
    """Nothing is lost, and memory was short enough for every way to give it up."""
    assert main(["--no-save", "--minutes", "0.4", "--seed", "1"]) == 0


def test_killed_schedulers() -> None:
    assert main(["--no-save", "--minutes", "0.6", "--seed", "2", "--kill-every", "8"]) == 0
