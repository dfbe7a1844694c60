"""One real server on the smallest model, for every client."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.clients.frontend import load_frontend

MODEL = "smollm2-135m"
START_SECONDS = 240.0


@pytest.fixture(scope="package")
def server_url() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tca_runtime.launch_server"]
    command += ["--model-path", MODEL, "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="tca-test-") as directory:
        log = Path(directory) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended at its start:\n{log.read_text()[-4000:]}")
        try:
            if requests.get(url + "/health", timeout=5).status_code == 200:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the server was not ready in {START_SECONDS:.0f} s:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def sgl() -> Any:
    return load_frontend()


@pytest.fixture
def backend(sgl: Any, server_url: str) -> Any:
    backend = sgl.RuntimeEndpoint(server_url, chat_template_name="chatml")
    sgl.set_default_backend(backend)
    return backend
