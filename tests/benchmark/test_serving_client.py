import asyncio
from collections.abc import Sequence

import pytest

from benchmark.serving.client import (
    BACKENDS,
    Backend,
    Endpoint,
    Message,
    flush_cache,
    generate,
    model_name,
    open_http,
    send,
    transcript,
)
from benchmark.serving.load import run_closed_loop, run_open_loop
from benchmark.serving.metrics import RequestResult
from benchmark.serving.workloads import Session, Turn
from tests.benchmark.fake_server import FakeServer


def ask(server: FakeServer, backend: Backend, text: str, tokens: int = 4) -> RequestResult:
    async def run() -> RequestResult:
        async with open_http(10) as http:
            endpoint = Endpoint(server.url, backend, model="fake-model")
            return await send(http, endpoint, [Message("user", text)], tokens)

    return asyncio.run(run())


def converse(
    server: FakeServer, backend: Backend, sessions: Sequence[Session], concurrency: int
) -> list[RequestResult]:
    results: list[RequestResult] = []

    async def run() -> None:
        async with open_http(10) as http:
            endpoint = Endpoint(server.url, backend)
            await run_closed_loop(http, endpoint, sessions, concurrency, results.append)

    asyncio.run(run())
    return results


@pytest.mark.parametrize("backend", BACKENDS)
def test_reply_is_read(server: FakeServer, backend: Backend) -> None:
    first = ask(server, backend, "one two three")
    again = ask(server, backend, "one two three")
    assert first.error is None
    assert first.text == " r0 r1 r2 r3"
    assert len(first.text_times) == 4
    assert first.start < first.text_times[0] <= first.text_times[-1] <= first.end
    assert first.completion_tokens == 4
    assert first.cached_tokens == 0
    assert again.cached_tokens == again.prompt_tokens == first.prompt_tokens > 3


def test_tokens_are_timed_where_every_chunk_counts_them(server: FakeServer) -> None:
    result = ask(server, "sglang", "one two three")
    assert len(result.token_times) == result.completion_tokens
    counted_at_the_end = ask(server, "openai", "one two three").token_times
    assert len(counted_at_the_end) == 1


def test_sglang_reports_ids_and_latency(server: FakeServer) -> None:
    r = ask(server, "sglang", "hello")
    assert r.output_ids == (0, 1, 2, 3)
    assert r.server_latency == 0.25


def test_request_bodies(server: FakeServer) -> None:
    for backend in BACKENDS:
        ask(server, backend, "hi", tokens=3)
    sglang, chat, completion = server.bodies
    assert sglang["sampling_params"] == {
        "max_new_tokens": 3,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    assert sglang["stream"] is chat["stream"] is completion["stream"] is True
    assert chat["messages"] == [{"role": "user", "content": "hi"}]
    assert chat["stream_options"] == {"include_usage": True}
    assert completion["prompt"] == sglang["text"] == "user: hi\n\nassistant:"
    assert chat["model"] == completion["model"] == "fake-model"


@pytest.mark.parametrize(
    ("backend", "prompt", "message"),
    [
        *[(b, "!http", "HTTP 400: prompt too long") for b in BACKENDS],
        *[(b, "!stream-error", "engine died") for b in BACKENDS],
        *[(b, "!no-done", "ended without") for b in BACKENDS],
        ("sglang", "!abort", "aborted: out of memory"),
        ("openai", "!no-usage", "no token counts"),
        ("openai-completions", "!no-usage", "no token counts"),
    ],
)
def test_failures_are_named(
    server: FakeServer, backend: Backend, prompt: str, message: str
) -> None:
    r = ask(server, backend, prompt)
    assert r.error is not None
    assert message in r.error


def test_no_server_is_an_error_of_the_request() -> None:
    async def run() -> RequestResult:
        async with open_http(5) as http:
            endpoint = Endpoint("http://127.0.0.1:9", "sglang")
            return await send(http, endpoint, [Message("user", "x")], 1)

    error = asyncio.run(run()).error
    assert error is not None
    assert "127.0.0.1:9" in error


def test_raw_ids_flush_and_model_name(server: FakeServer) -> None:
    async def run() -> tuple[RequestResult, str]:
        async with open_http(5) as http:
            reply = await generate(http, server.url, [7, 8, 9], {"max_new_tokens": 2})
            await flush_cache(http, server.url)
            return reply, await model_name(http, server.url)

    reply, name = asyncio.run(run())
    assert reply.prompt_tokens == 3
    assert server.bodies[0]["input_ids"] == [7, 8, 9]
    assert server.flushes == 1
    assert name == "fake-model"


def test_each_turn_extends_the_prompt_before_it(server: FakeServer) -> None:
    session = Session((Turn("first", 2), Turn("second", 2), Turn("third", 2)), system="be kind")
    results = converse(server, "sglang", [session], concurrency=1)
    prompts = [body["text"] for body in server.bodies]
    for before, result, after in zip(prompts, results, prompts[1:], strict=False):
        assert after.startswith(before + result.text)
    cached = [r.cached_tokens for r in results]
    assert cached[0] == 0
    assert cached[1:] == [r.prompt_tokens + r.completion_tokens for r in results[:2]]


def test_transcript_keeps_roles() -> None:
    text = transcript([Message("system", "s"), Message("user", "u"), Message("assistant", " a")])
    assert text == "system: s\n\nuser: u\n\nassistant: a\n\nassistant:"


def test_a_failed_turn_ends_its_conversation(server: FakeServer) -> None:
    sessions = [
        Session((Turn("fine", 1), Turn("!http", 1), Turn("never sent", 1))),
        Session((Turn("fine", 1), Turn("also fine", 1))),
    ]
    results = converse(server, "openai", sessions, concurrency=1)
    assert [r.error is None for r in results] == [True, False, True, True]


def test_closed_loop_keeps_its_concurrency(server: FakeServer) -> None:
    sessions = [Session((Turn(f"request {i}", 5),)) for i in range(20)]
    results = converse(server, "sglang", sessions, concurrency=4)
    assert len(results) == 20
    assert server.most_in_flight == 4


def test_open_loop_does_not_wait_for_replies(server: FakeServer) -> None:
    sessions = [Session((Turn(f"request {i}", 50),)) for i in range(10)]
    results: list[RequestResult] = []

    async def run() -> None:
        async with open_http(10) as http:
            endpoint = Endpoint(server.url, "sglang")
            await run_open_loop(http, endpoint, sessions, 1000.0, 0, results.append)

    asyncio.run(run())
    assert len(results) == 10
    assert all(r.error is None for r in results)
    assert server.most_in_flight > 1
