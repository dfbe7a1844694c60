"""What a server does when it loses its scheduler, and when it is told to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests

from tests.faults.launched import Asking, Launched

pytestmark = pytest.mark.slow

Launch = Callable[..., Launched]

FAULTY = str(Path(__file__).with_name("faulty_server.py"))
CONNECTING = str(Path(__file__).with_name("connecting_server.py"))


def test_the_first_connection_after_the_ready_line_is_accepted(launch: Launch) -> None:
    server = launch(program=(CONNECTING,), ready=False)
    server.wait_until(lambda: "The server is ready" in server.printed)
    assert server.health() == 200


def test_killed_scheduler_fails_open_requests_and_ends_the_launcher(launch: Launch) -> None:
    server = launch()
    asking = Asking(server, 15000)
    server.scheduler().send_signal(signal.SIGKILL)
    assert asking.response.status_code == 503
    assert server.health() == 503
    assert server.process.wait(30) == 1
    assert "scheduler died" in server.printed


def test_restarted_scheduler_serves_again(launch: Launch) -> None:
    server = launch("--restart-on-crash")
    expected = server.generate(8, text="again").json()["meta_info"]["prompt_tokens"]
    for restarts in (1, 2):
        asking = Asking(server, 15000)
        killed = server.scheduler()
        killed.send_signal(signal.SIGKILL)
        assert asking.response.status_code == 503
        assert server.health() == 503
        assert "failed" in server.generate().json()["error"]["message"]
        server.wait_ready()
        assert not killed.is_running()
        info = server.info()
        assert info["num_restarts"] == restarts
        assert info["num_running_reqs"] == 0 and server.lost_slots() == 0
        reply = server.generate(8, text="again").json()
        assert reply["meta_info"]["prompt_tokens"] == expected
        assert reply["meta_info"]["completion_tokens"] == 8
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


def test_restarts_are_bounded(launch: Launch) -> None:
    server = launch("--restart-on-crash", "--max-restarts", "1")
    server.scheduler().send_signal(signal.SIGKILL)
    server.wait_until(lambda: server.health() == 503)
    server.wait_ready()
    server.scheduler().send_signal(signal.SIGKILL)
    assert server.process.wait(30) == 1
    assert "giving up" in server.printed


@pytest.mark.parametrize("how", ["python", "native"])
def test_hung_step_prints_stacks_and_counts_as_a_crash(
    launch: Launch, tmp_path: Path, how: str
) -> None:
    trigger = tmp_path / "hang"
    server = launch(
        "--watchdog-timeout",
        "3",
        "--restart-on-crash",
        program=(FAULTY, how),
        HANG_FILE=str(trigger),
    )
    hung = server.scheduler()
    trigger.touch()
    response = server.generate()
    assert response.status_code == 503
    assert "hung" in response.json()["error"]["message"]
    server.wait_ready()
    assert not hung.is_running()
    assert "faulty_server.py" in server.printed and "hang_here" in server.printed
    assert server.generate().status_code == 200


def test_stopped_scheduler_counts_as_a_crash(launch: Launch) -> None:
    server = launch("--watchdog-timeout", "2")
    scheduler = server.scheduler()
    scheduler.send_signal(signal.SIGSTOP)
    assert server.process.wait(30) == 1
    assert not scheduler.is_running()


def test_sigterm_lets_open_requests_finish(launch: Launch) -> None:
    server = launch()
    scheduler = server.scheduler()
    asking = Asking(server, 400)
    server.process.send_signal(signal.SIGTERM)
    server.wait_until(lambda: server.health() == 503)
    refused = server.generate()
    assert refused.status_code == 503 and "shutting down" in refused.text
    assert asking.response.json()["meta_info"]["completion_tokens"] == 400
    assert server.process.wait(30) == 0
    assert not scheduler.is_running()


@pytest.mark.parametrize("hurry", [False, True])
def test_sigterm_ends_what_takes_too_long(launch: Launch, hurry: bool) -> None:
    server = launch("--shutdown-timeout", "60" if hurry else "1")
    asking = Asking(server, 19000)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    if hurry:
        server.wait_until(lambda: server.health() == 503)
        server.process.send_signal(signal.SIGTERM)
    assert asking.response.status_code == 503
    assert "shutting down" in asking.response.text
    assert server.process.wait(30) == 0
    assert time.monotonic() - started < 30


def test_sigterm_of_the_whole_group_drains_too(launch: Launch) -> None:
    """Service managers signal every process, the scheduler included."""
    server = launch()
    asking = Asking(server, 400)
    for process in (server.scheduler(), psutil.Process(server.process.pid)):
        process.send_signal(signal.SIGTERM)
    assert asking.response.status_code == 200
    assert server.process.wait(30) == 0


def test_sigterm_during_the_start(launch: Launch) -> None:
    server = launch(ready=False)
    launcher = psutil.Process(server.process.pid)

    def spawned() -> list[psutil.Process]:
        return [child for child in launcher.children() if "spawn" in _line(child)]

    # Not the socket alone: it is there before the child is, and the child before its command line.
    server.wait_until(lambda: bool(server.sockets("tokenizer")) and bool(spawned()))
    (child,) = spawned()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert not child.is_running()
    assert not server.sockets("tokenizer")


def test_scheduler_does_not_outlive_a_killed_launcher(launch: Launch) -> None:
    server = launch()
    scheduler = server.scheduler()
    server.process.kill()
    server.process.wait(10)
    scheduler.wait(20)


def test_full_disk_under_the_log(launch: Launch) -> None:
    server = launch("--restart-on-crash", "--log-level", "debug", log=Path("/dev/full"))
    assert server.generate(8).status_code == 200
    server.scheduler().send_signal(signal.SIGKILL)
    server.wait_until(lambda: server.health() == 503)
    server.wait_ready()
    assert server.generate(8).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


def test_closed_log_pipe(launch: Launch, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    server = launch("--log-level", "debug", log=pipe, ready=False)
    os.close(reader)
    server.wait_until(lambda: server.health() == 200)
    assert requests.get(server.url + "/server_info", timeout=10).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


def _line(process: psutil.Process) -> str:
    return " ".join(process.cmdline())
