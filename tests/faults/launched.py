"""A real server in processes of its own, on a tiny random model, for tests that break it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmark.server_process import free_port

TINY = ("--load-format", "dummy", "--model-config", "tiny", "--max-total-tokens", "20000")
LAUNCH = ("-m", "tca_runtime.launch_server")
LIMIT = 120.0


class Launched:
    """A server process and what it printed.

    Parameters
    ----------
    directory : for its log, and for its sockets where ``sockets`` finds them
    program : what Python runs instead of the plain server
    log : where it prints instead
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        program: Sequence[str] = LAUNCH,
        log: Path | None = None,
        **environment: str,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log or directory / "log"
        self._directory = directory
        command = [sys.executable, *program, *TINY, "--port", str(self.port), *arguments]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(directory), **environment},
            )

    @property
    def printed(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def sockets(self, end: str) -> list[str]:
        """Addresses of the sockets between the processes, ``end`` "scheduler" or "tokenizer"."""
        return [f"ipc://{path}" for path in sorted(self._directory.glob(f"tca-*/*-{end}"))]

    def wait_ready(self) -> None:
        self.wait_until(lambda: self.health() == 200)

    def wait_until(self, condition: Callable[[], bool], seconds: float = LIMIT) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            tail = self.printed[-4000:]
            assert self.process.poll() is None, f"status {self.process.returncode}\n{tail}"
            assert time.monotonic() < deadline, tail
            time.sleep(0.05)

    def health(self) -> int | None:
        """Status of ``/health``, None while nobody listens."""
        try:
            return requests.get(self.url + "/health", timeout=10).status_code
        except requests.ConnectionError:
            return None

    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = requests.get(self.url + "/server_info", timeout=10).json()
        return info

    def lost_slots(self) -> int:
        """Slots that nobody owns; negative when some have two owners."""
        cache = self.info()["kv_cache"]
        owned = cache["free_slots"] + cache["tree_slots"] + cache["running_slots"]
        return int(cache["total_slots"] - owned)

    def scheduler(self) -> psutil.Process:
        """The child that holds the model."""
        children = psutil.Process(self.process.pid).children()
        return max(children, key=lambda child: child.memory_info().rss)

    def generate(self, tokens: int = 4, **fields: Any) -> requests.Response:
        """One prompt whose reply has exactly so many tokens."""
        params = {"max_new_tokens": tokens, "temperature": 1, "ignore_eos": True}
        body = {"text": "hello", "sampling_params": params, **fields}
        return requests.post(self.url + "/generate", json=body, timeout=LIMIT)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)


class Asking:
    """A request in a thread of its own; ``status`` and ``reply`` once it is answered."""

    def __init__(self, server: Launched, tokens: int) -> None:
        self._response: requests.Response | None = None
        self._thread = threading.Thread(target=self._run, args=(server, tokens))
        running = server.info()["num_running_reqs"]
        self._thread.start()
        server.wait_until(lambda: server.info()["num_running_reqs"] > running)

    def _run(self, server: Launched, tokens: int) -> None:
        self._response = server.generate(tokens)

    @property
    def response(self) -> requests.Response:
        self._thread.join(LIMIT)
        assert self._response is not None, "no answer"
        return self._response


def start_that_fails(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *LAUNCH, *arguments], capture_output=True, text=True, timeout=LIMIT
    )
