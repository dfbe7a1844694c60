"""Start our own server for a benchmark, on a free loopback port, and end it for certain."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class RunningServer:
    """A server that has answered /health."""

    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time used so far by the server and its children."""
        total = 0.0
        for process in _family(self.pid):
            times = process.cpu_times()
            total += times.user + times.system
        return total


@contextmanager
def running_server(
    flags: Sequence[str],
    threads: int | None = None,
    start_timeout_s: float = 300,
    module: str = "tca_runtime.launch_server",
) -> Iterator[RunningServer]:
    """Run ``python -m tca_runtime.launch_server`` with ``flags`` while the block lasts.

    ``module`` is run instead of it where the scheduler is to be different.

    Raises
    ------
    RuntimeError
        If the server exits or does not get healthy in time; the message ends with its log.
    """
    # SIGTERM would end this process without the block below, and leave the server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    port = free_port()
    command = [sys.executable, "-m", module, *flags, "--port", str(port)]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "server.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment_with_threads(threads)
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_healthy(process, url, time.monotonic() + start_timeout_s, log)
            yield RunningServer(url, process.pid)
        finally:
            _end(process)


def environment_with_threads(threads: int | None) -> dict[str, str]:
    """This environment with every thread pool that computes limited to ``threads``."""
    environment = dict(os.environ)
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            environment[name] = str(threads)
    return environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_healthy(process: subprocess.Popen[bytes], url: str, deadline: float, log: Path) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"server exited with {process.returncode}:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(url + "/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"server not healthy in time:\n{_tail(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    # Collected before the parent goes: an orphan could no longer be found by its parent.
    family = _family(process.pid)
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=15)
    for survivor in alive:
        survivor.kill()
    process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
