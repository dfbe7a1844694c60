"""What a server does when it cannot start or loses its scheduler."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

pytestmark = pytest.mark.slow

TINY = ("--load-format", "dummy", "--model-config", "tiny", "--max-total-tokens", "20000")
LIMIT = 120.0


class Launched:
    """A server process on a tiny random model, and what it printed."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "log"
        command = [sys.executable, "-m", "tca_runtime.launch_server", *TINY]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + LIMIT
        while "The server is ready" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def scheduler(self) -> psutil.Process:
        """The child that holds the model."""
        children = psutil.Process(self.process.pid).children()
        return max(children, key=lambda child: child.memory_info().rss)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(tmp_path)
    try:
        launched.wait_ready()
        yield launched
    finally:
        launched.end()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A start that must fail."""
    return subprocess.run(
        [sys.executable, "-m", "tca_runtime.launch_server", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_killed_scheduler_fails_open_requests_and_ends_the_launcher(server: Launched) -> None:
    replies: list[Any] = []
    body = {
        "text": "hello",
        "sampling_params": {"max_new_tokens": 15000, "temperature": 1, "ignore_eos": True},
    }

    def ask() -> None:
        replies.append(requests.post(server.url + "/generate", json=body, timeout=LIMIT))

    client = threading.Thread(target=ask)
    client.start()
    time.sleep(1.0)
    server.scheduler().send_signal(signal.SIGKILL)
    client.join(LIMIT)
    assert [reply.status_code for reply in replies] == [503]
    assert requests.get(server.url + "/health", timeout=5).status_code == 503
    assert server.process.wait(30) == 1
    assert "scheduler died" in server.log.read_text()


def test_sigterm_ends_all_processes(server: Launched) -> None:
    scheduler = server.scheduler()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    scheduler.wait(10)


def test_scheduler_does_not_outlive_a_killed_launcher(server: Launched) -> None:
    scheduler = server.scheduler()
    server.process.kill()
    server.process.wait(10)
    scheduler.wait(20)


def test_port_in_use_is_told_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run(*TINY, "--port", port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_model_is_named() -> None:
    done = run("--model-path", "/no/such/model", "--port", "0")
    assert done.returncode == 1
    assert "/no/such/model" in done.stderr


def test_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("{}")
    done = run(*TINY, "--port", "0", "--tca-config", str(path))
    assert done.returncode == 1
    assert str(path) in done.stderr
