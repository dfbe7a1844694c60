"""One real server on the smallest model, for every client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmark.server_process import running_server
from tests.clients.frontend import load_frontend

MODEL = "smollm2-135m"
START_SECONDS = 240.0


@pytest.fixture(scope="package")
def server_url() -> Iterator[str]:
    with running_server(["--model-path", MODEL], start_timeout_s=START_SECONDS) as server:
        yield server.url


@pytest.fixture(scope="session")
def sgl() -> Any:
    return load_frontend()


@pytest.fixture
def backend(sgl: Any, server_url: str) -> Any:
    backend = sgl.RuntimeEndpoint(server_url, chat_template_name="chatml")
    sgl.set_default_backend(backend)
    return backend
