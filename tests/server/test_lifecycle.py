"""Disconnects, aborts, and a scheduler that dies: no request is ever left open."""

from __future__ import annotations

import concurrent.futures
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import requests
import starlette.requests

from tests.server.harness import Server, eventually, running_server
from tests.server.test_native import events, script

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"text": "hello", "sampling_params": script(hang=True)}),
    ("/generate", {"text": ["a", "b"], "sampling_params": script(hang=True)}),
    ("/v1/completions", {"prompt": "hello", **script(hang=True)}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **script(hang=True)}),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), BODIES)
def test_client_that_leaves_before_the_first_token(
    server: Server, path: str, body: dict[str, Any], stream: bool
) -> None:
    before = len(server.scheduler.received)
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(server.url + path, json={**body, "stream": stream}, timeout=0.3)
    rids = {message.rid for message in server.scheduler.received[before:]}
    assert rids
    eventually(lambda: rids <= set(server.scheduler.aborted))
    eventually(lambda: server.manager.num_open == 0)


def test_client_that_leaves_during_a_stream(server: Server) -> None:
    params = script(answer="hello " * 100, delay=0.01, max_new_tokens=400)
    body = {"text": "hello", "sampling_params": params, "stream": True}
    with server.post("/generate", body, stream=True) as response:
        next(response.iter_lines())
    rid = server.scheduler.received[-1].rid
    eventually(lambda: rid in server.scheduler.aborted)
    eventually(lambda: server.manager.num_open == 0 and server.scheduler.num_active == 0)


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/start_profile"])
def test_client_that_leaves_while_it_sends_its_body(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    ended = threading.Event()
    stream = starlette.requests.Request.stream

    async def watched(request: starlette.requests.Request) -> AsyncGenerator[bytes, None]:
        try:
            async for part in stream(request):
                yield part
        except starlette.requests.ClientDisconnect:
            ended.set()
            raise

    monkeypatch.setattr(starlette.requests.Request, "stream", watched)
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    with caplog.at_level(logging.INFO):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head.encode() + b'{"text": ')
        assert ended.wait(10)
        # Handled on the loop that ``ended`` was set on.
        assert server.get("/v1/models").status_code == 200
    assert [r for r in caplog.records if r.levelno >= logging.ERROR or r.exc_info] == []


@pytest.mark.parametrize("abort", [{"rid": "victim"}, {"rid": "", "abort_all": True}])
def test_abort_request_ends_with_a_normal_reply(server: Server, abort: dict[str, Any]) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body = {"text": ["a", "b"], "rid": "victim", "sampling_params": script(hang=True)}
        reply = pool.submit(server.post, "/generate", body)
        eventually(lambda: server.manager.num_open == 2)
        assert server.post("/abort_request", abort).status_code == 200
        response = reply.result()
    assert response.status_code == 200
    reasons = [item["meta_info"]["finish_reason"]["type"] for item in response.json()]
    assert reasons == ["abort", "abort"]


@pytest.mark.parametrize(
    ("path", "body", "outputs"),
    [
        ("/generate", {"text": ["a", "b"], "sampling_params": script(hang=True)}, 2),
        ("/generate", {"text": ["a", "b"], "sampling_params": script(hang=True, n=2)}, 4),
        ("/generate", {"text": "a", "sampling_params": script(hang=True, n=2)}, 2),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, **script(hang=True)}, 4),
    ],
)
def test_abort_of_a_call_ends_its_outputs_and_no_similar_rid(
    server: Server, path: str, body: dict[str, Any], outputs: int
) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        call = pool.submit(server.post, path, {**body, "rid": "job"})
        similar = {"text": "a", "rid": "job_of_another", "sampling_params": script(hang=True)}
        other = pool.submit(server.post, "/generate", similar)
        eventually(lambda: server.manager.num_open == outputs + 1)
        before = len(server.scheduler.aborted)
        try:
            assert server.post("/abort_request", {"rid": "job"}).status_code == 200
            assert call.result().status_code == 200
            assert len(server.scheduler.aborted) == before + outputs
            assert server.manager.num_open == 1
        finally:
            server.post("/abort_request", {"rid": "", "abort_all": True})
        assert other.result().json()["meta_info"]["id"] == "job_of_another"


def test_abort_of_a_prompt_ends_its_samples(server: Server) -> None:
    body = {"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": script(hang=True, n=2)}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        call = pool.submit(server.post, "/generate", body)
        eventually(lambda: server.manager.num_open == 4)
        for rid, left in (("y", 2), ("x_1", 1), ("x_0", 0)):
            assert server.post("/abort_request", {"rid": rid}).status_code == 200
            eventually(lambda left=left: server.manager.num_open == left)
        assert call.result().status_code == 200


def test_abort_of_something_else_changes_nothing(server: Server) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        params = script(delay=0.05, answer="hello there")
        reply = pool.submit(server.generate, text="a", rid="keep", sampling_params=params)
        eventually(lambda: server.manager.num_open == 1)
        assert server.post("/abort_request", {"rid": "kee"}).status_code == 200
        assert server.post("/abort_request", {}).status_code == 400
        assert reply.result()["text"] == "hello there"


def test_rid_can_be_used_again_at_once(server: Server) -> None:
    with pytest.raises(requests.exceptions.ReadTimeout):
        body = {"text": "a", "rid": "same", "sampling_params": script(hang=True)}
        requests.post(server.url + "/generate", json=body, timeout=0.2)
    reply = server.generate(text="a", rid="same")
    assert reply["meta_info"]["finish_reason"]["type"] == "stop"
    assert reply["meta_info"]["id"] == "same"


def test_scheduler_death_ends_everything(own_server: Server) -> None:
    server = own_server
    assert server.get("/health").status_code == 200
    responses: list[requests.Response] = []
    threads = [
        threading.Thread(target=lambda p=path, b=body: responses.append(server.post(p, b)))
        for path, body in BODIES
    ]
    for thread in threads:
        thread.start()
    params = script(answer="hello " * 100, delay=0.01, max_new_tokens=400)
    body = {"text": "hello", "sampling_params": params, "stream": True}
    with server.post("/generate", body, stream=True) as stream:
        lines = stream.iter_lines()
        next(lines)
        eventually(lambda: server.manager.num_open == 6)
        server.scheduler.die("Traceback ...\nRuntimeError: out of luck\n")
        rest = [line for line in lines if line]
    assert rest[-1] == b"data: [DONE]" and b'"code":503' in rest[-2]
    for thread in threads:
        thread.join(10)
    assert [r.status_code for r in responses] == [503] * len(BODIES)
    assert all("out of luck" in r.text for r in responses)
    for path in ("/health", "/health_generate"):
        response = server.get(path)
        assert response.status_code == 503 and "out of luck" in response.text
    assert server.post("/generate", {"text": "a"}).status_code == 503
    assert server.post("/flush_cache", {}).status_code == 503
    assert server.get("/server_info").status_code == 200
    assert server.manager.failure == "RuntimeError: out of luck"


def test_scheduler_death_ends_control_calls(own_server: Server) -> None:
    own_server.scheduler.deaf.set()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        reply = pool.submit(own_server.post, "/flush_cache", None)
        eventually(lambda: bool(own_server.scheduler.controls))
        own_server.scheduler.die("KeyError: 3")
        response = reply.result()
    assert response.status_code == 503 and "KeyError: 3" in response.text


def test_launcher_can_report_the_death(own_server: Server) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        reply = pool.submit(own_server.post, *BODIES[0])
        eventually(lambda: own_server.manager.num_open == 1)
        own_server.manager.fail("the scheduler exited with status -9")
        own_server.post("/abort_request", {"rid": "x"})
        response = reply.result()
    assert response.status_code == 503 and "status -9" in response.text


def test_silence_makes_the_server_unhealthy() -> None:
    with running_server(heartbeat_timeout=0.5) as server:
        assert server.get("/health").status_code == 200
        server.scheduler.silent.set()
        eventually(lambda: server.get("/health").status_code == 503)
        server.scheduler.silent.clear()
        eventually(lambda: server.get("/health").status_code == 200)


def test_many_streams_at_once(server: Server) -> None:
    def run(number: int) -> str:
        params = script(answer=f"hello {number} world", delay=0.002)
        body = {"text": f"prompt {number}", "sampling_params": params, "stream": True}
        return str(events(server.post("/generate", body, stream=True))[-1]["text"])

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        texts = list(pool.map(run, range(200)))
    assert texts == [f"hello {number} world" for number in range(200)]
    assert server.manager.num_open == 0


def test_long_prompt_does_not_block_others(own_server: Server) -> None:
    server = own_server
    server.manager.encoder.characters_per_token = 1_000_000
    body = {"text": "the quick brown fox " * 60_000}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        long = pool.submit(server.post, "/generate", body)
        time.sleep(0.05)
        others = 0
        while not long.done():
            assert server.get("/health").status_code == 200
            others += 1
    assert long.result().status_code == 400
    assert others >= 3
