"""Broken messages from the scheduler, a new scheduler, and the time before the end."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import msgspec
import pytest

from tca_runtime.messages import ControlReply, Heartbeat, TokenBatch, TokenOutput
from tests.server.fake_scheduler import STATE
from tests.server.harness import Server, eventually
from tests.server.test_native import script

HANGING = {"text": "hello", "sampling_params": script(hang=True)}


def send_raw(server: Server, raw: bytes) -> None:
    # The thread of the fake scheduler is the only other user, and it sends heartbeats only.
    server.scheduler.silent.set()
    server.scheduler._outbox._socket.send(raw)


def open_requests(
    server: Server, pool: concurrent.futures.Executor, count: int
) -> tuple[list[concurrent.futures.Future[Any]], list[str]]:
    before = len(server.scheduler.received)
    replies = [pool.submit(server.post, "/generate", HANGING) for _ in range(count)]
    eventually(lambda: len(server.scheduler.received) == before + count)
    return replies, [message.rid for message in server.scheduler.received[before:]]


def test_unreadable_output_ends_its_request_only(own_server: Server) -> None:
    server = own_server
    with concurrent.futures.ThreadPoolExecutor() as pool:
        replies, rids = open_requests(server, pool, 2)
        batch = TokenBatch(outputs=[TokenOutput(rid=rids[0], token_ids=[1])])
        content = msgspec.msgpack.decode(msgspec.msgpack.encode(batch))
        content["outputs"][0]["token_ids"] = "many"
        send_raw(server, msgspec.msgpack.encode(content))
        eventually(lambda: server.scheduler.aborted == [rids[0]])
        done, waiting = concurrent.futures.wait(replies, timeout=1)
        assert len(done) == len(waiting) == 1
        assert done.pop().result().status_code == 500
        server.post("/abort_request", {"abort_all": True})
        assert waiting.pop().result().status_code == 200
    assert server.generate(text="a")["meta_info"]["finish_reason"]["type"] == "stop"


def test_batch_that_is_cut_off_ends_all(own_server: Server) -> None:
    server = own_server
    with concurrent.futures.ThreadPoolExecutor() as pool:
        replies, rids = open_requests(server, pool, 2)
        send_raw(server, msgspec.msgpack.encode(TokenBatch(outputs=[]))[:-1])
        assert [reply.result().status_code for reply in replies] == [500, 500]
    eventually(lambda: set(server.scheduler.aborted) == set(rids))
    assert server.generate(text="a")["meta_info"]["finish_reason"]["type"] == "stop"


@pytest.mark.parametrize(
    "message", [Heartbeat(state=STATE), ControlReply(call_id="x", ok=True)], ids=["beat", "reply"]
)
def test_other_unreadable_messages_end_nothing(own_server: Server, message: Any) -> None:
    server = own_server
    with concurrent.futures.ThreadPoolExecutor() as pool:
        (reply,), _ = open_requests(server, pool, 1)
        content = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
        content[next(name for name in ("state", "ok") if name in content)] = "nonsense"
        send_raw(server, msgspec.msgpack.encode(content))
        assert server.generate(text="a")["meta_info"]["finish_reason"]["type"] == "stop"
        assert not reply.done() and not server.scheduler.aborted
        server.post("/abort_request", {"abort_all": True})
        assert reply.result().status_code == 200


def test_draining_server_finishes_and_refuses(own_server: Server) -> None:
    server = own_server
    with concurrent.futures.ThreadPoolExecutor() as pool:
        (reply,), rids = open_requests(server, pool, 1)
        server.manager.draining = True
        for response in (server.get("/health"), server.post("/generate", {"text": "a"})):
            assert response.status_code == 503 and "shutting down" in response.text
        assert server.get("/server_info").json()["kv_cache"]
        assert not reply.done()
        loop = server.manager._listener.get_loop()  # type: ignore[union-attr]
        loop.call_soon_threadsafe(server.manager.end_open, "the server is shutting down", 503)
        assert reply.result().status_code == 503
    eventually(lambda: server.scheduler.aborted == rids)
    assert server.manager.num_open == 0


def test_revived_server_serves_again(own_server: Server) -> None:
    manager = own_server.manager
    with concurrent.futures.ThreadPoolExecutor() as pool:
        (reply,), _ = open_requests(own_server, pool, 1)
        loop = manager._listener.get_loop()  # type: ignore[union-attr]
        loop.call_soon_threadsafe(manager.fail, "killed")
        assert reply.result().status_code == 503
    assert own_server.get("/health").status_code == 503
    again = manager.revive(
        manager._to_scheduler, manager._from_scheduler, {**manager.info, "num_restarts": 1}
    )
    asyncio.run_coroutine_threadsafe(again, loop).result(10)
    assert own_server.get("/health").status_code == 200
    assert own_server.get("/server_info").json()["num_restarts"] == 1
    assert own_server.generate(text="a")["meta_info"]["finish_reason"]["type"] == "stop"
