"""Servers that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.launched import Launched


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts a server, by default until it is ready."""
    started: list[Launched] = []

    def start(*arguments: str, ready: bool = True, **options: Any) -> Launched:
        directory = tmp_path / str(len(started))
        directory.mkdir()
        started.append(Launched(directory, *arguments, **options))
        if ready:
            started[-1].wait_ready()
        return started[-1]

    yield start
    for server in started:
        server.end()
