from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.harness import Server, running_server


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that a test may break."""
    with running_server() as running:
        yield running
