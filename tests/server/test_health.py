"""``/health_generate`` of servers that are idle, busy, full, and stuck."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tca_runtime.sampling_params import SamplingParams
from tca_runtime.server import health
from tests.server.harness import Server, eventually
from tests.server.test_native import script

# Of a server that gives a probe its turn only when it is idle.
BUSY = ("full", "starving")


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LIMIT_SECONDS", 2.0)


@contextmanager
def client(server: Server, delay: float) -> Iterator[None]:
    """Somebody whose reply comes token by token."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sampling = script(answer="hello " * 100, delay=delay, max_new_tokens=400)
        body = {"text": "hello", "rid": "client", "stream": True, "sampling_params": sampling}
        pool.submit(server.post, "/generate", body)
        eventually(lambda: server.manager.tokens_received > 0)
        try:
            yield
        finally:
            server.post("/abort_request", {"rid": "client"})


def test_a_probe_asks_for_less_than_anybody(server: Server) -> None:
    assert server.get("/health_generate").status_code == 200
    probe = server.scheduler.received[-1]
    assert probe.priority == -(2**63) and probe.sampling.max_new_tokens == 1


@pytest.mark.parametrize("how", BUSY)
def test_tokens_of_others_are_a_sign_of_health(own_server: Server, how: str) -> None:
    with client(own_server, delay=0.02):
        getattr(own_server.scheduler, how).set()
        assert own_server.get("/health_generate").status_code == 200


@pytest.mark.parametrize("how", BUSY)
def test_steps_are_a_sign_of_health_when_nobody_is_told_of_tokens(
    own_server: Server, how: str
) -> None:
    getattr(own_server.scheduler, how).set()
    own_server.scheduler.stepping.set()
    assert own_server.get("/health_generate").status_code == 200


@pytest.mark.parametrize("how", BUSY)
def test_a_server_that_gets_nowhere_is_unhealthy(own_server: Server, how: str) -> None:
    with client(own_server, delay=60.0):
        getattr(own_server.scheduler, how).set()
        response = own_server.get("/health_generate")
        assert response.status_code == 503 and "no token came in time" in response.text
    eventually(lambda: own_server.manager.num_open == 0)


def test_an_error_is_no_sign_of_health(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SamplingParams(custom_params={"error": [500, "broken"]})
    monkeypatch.setattr(health, "SamplingParams", lambda **fields: broken)
    response = own_server.get("/health_generate")
    assert response.status_code == 500 and "broken" in response.text
