"""Clients that read slowly, stall or vanish."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import psutil
import pytest

from tca_runtime import launch_server
from tca_runtime.config import ServerArgs
from tests.faults.launched import Launched

pytestmark = pytest.mark.slow


def open_stream(server: Launched, tokens: int) -> socket.socket:
    """Ask for a stream and read nothing of it; the client's own buffer is as small as can be."""
    params = {"max_new_tokens": tokens, "temperature": 1, "ignore_eos": True}
    body = json.dumps({"text": "hello", "stream": True, "sampling_params": params}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", server.port))
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def test_slow_readers_hold_neither_slots_nor_memory(launch: Callable[..., Launched]) -> None:
    """Streams repeat the text: 1000 tokens are megabytes of events, which must not pile up."""
    server = launch()
    launcher = psutil.Process(server.process.pid)
    server.generate(500)
    before = launcher.memory_info().rss
    readers = [open_stream(server, 1000) for _ in range(8)]
    server.wait_until(lambda: server.info()["num_running_reqs"] > 0)
    deadline = time.monotonic() + 120
    while server.info()["kv_cache"]["running_slots"]:
        assert time.monotonic() < deadline
        for reader in readers:
            assert len(reader.recv(1)) == 1
        time.sleep(1.0)
    grown = launcher.memory_info().rss - before
    # All events of one stream are over 2 MiB.
    assert grown < len(readers) * (1 << 20)
    assert server.generate(8).status_code == 200
    for reader in readers:
        reader.close()
    server.wait_until(lambda: server.lost_slots() == 0)


def test_vanished_clients_free_their_slots(launch: Callable[..., Launched]) -> None:
    server = launch()
    for _ in range(3):
        clients = [open_stream(server, 15000) for _ in range(8)]
        server.wait_until(lambda: server.info()["num_running_reqs"] == 8)
        for client in clients[:4]:
            client.close()
        for client in clients[4:]:
            # Discards what is unread, and the peer gets a reset instead of an end.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        server.wait_until(lambda: server.info()["kv_cache"]["running_slots"] == 0, 30)
    assert server.lost_slots() == 0
    assert server.info()["num_waiting_reqs"] == 0


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs TCP_USER_TIMEOUT")
def test_client_that_takes_nothing_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_server, "STALLED_CLIENT_SECONDS", 1)
    with launch_server.bind(ServerArgs(port=0)) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted, pytest.raises(TimeoutError):
                accepted.settimeout(60)
                while True:
                    accepted.sendall(bytes(1 << 16))
