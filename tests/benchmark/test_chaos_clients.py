"""The judge of chaos runs notices what it must."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from benchmark.chaos import clients
from benchmark.chaos.__main__ import Kill, Run
from benchmark.chaos.clients import Outcome, Record, run_job
from benchmark.chaos.traffic import Conduct, Job, Traffic


def event(text: str, finish: Any = None, rid: str = "r") -> str:
    meta = {"id": rid, "finish_reason": finish, "prompt_tokens": 1, "completion_tokens": 2}
    return json.dumps({"text": text, "output_ids": [1, 2], "meta_info": meta})


END = {"type": "length", "length": 2}
GOOD = [event("a"), event("ab", END), "[DONE]"]


def outcome(
    conduct: Conduct, answer: list[str] | str | int | None, refused: int | None = None
) -> Outcome:
    """What the client makes of events, of a whole body, of a status, or of silence."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if answer is None:
            await asyncio.sleep(60)
        if isinstance(answer, int):
            return web.Response(status=answer, text="{}")
        if isinstance(answer, str):
            return web.Response(text=answer, content_type="application/json")
        response = web.StreamResponse()
        await response.prepare(request)
        for item in answer or ():
            await response.write(f"data: {item}\n\n".encode())
        return response

    async def run() -> Outcome:
        app = web.Application()
        app.router.add_post("/generate", handle)
        app.router.add_post("/abort_request", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        job = Job("k", conduct, "r", "/generate", {}, lambda output: None, refused=refused)
        try:
            async with aiohttp.ClientSession() as http:
                record = await run_job(http, f"http://{host}:{port}", job, random.Random(0))
        finally:
            await runner.cleanup()
        return record.outcome

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOOD, Outcome.ANSWERED),
        (GOOD[:-1], Outcome.FAILED),
        ([GOOD[0], "[DONE]"], Outcome.WRONG),
        ([*GOOD[:-1], event("ab", END), "[DONE]"], Outcome.WRONG),
        ([*GOOD, event("ab", END)], Outcome.WRONG),
        ([event("b"), event("ab", END), "[DONE]"], Outcome.WRONG),
        ([event("ab", END, rid="other"), "[DONE]"], Outcome.WRONG),
        ([event("ab", {"type": "abort"}), "[DONE]"], Outcome.WRONG),
        ([event("a"), '{"error": {"code": 503}}', "[DONE]"], Outcome.FAILED),
        ([event("a"), '{"error": {"code": 500}}', "[DONE]"], Outcome.WRONG),
        (["nonsense"], Outcome.WRONG),
        (503, Outcome.FAILED),
        (500, Outcome.WRONG),
        (400, Outcome.WRONG),
    ],
)
def test_streams(answer: list[str] | int, expected: Outcome) -> None:
    assert outcome("stream", answer) is expected


def test_whole_replies() -> None:
    assert outcome("whole", event("ab", END)) is Outcome.ANSWERED
    assert outcome("whole", f"[{event('ab', END)}, {event('ab', END)}]") is Outcome.WRONG
    assert outcome("whole", 400, refused=400) is Outcome.REFUSED
    assert outcome("whole", event("ab", END), refused=400) is Outcome.WRONG
    assert outcome("abort", event("a", {"type": "abort"})) is Outcome.ABORTED


def test_silence_is_a_lost_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "PATIENCE_S", 0.2)
    assert outcome("stream", None) is Outcome.LOST
    assert outcome("leave-stream", [event("a")] * 30) is Outcome.LEFT


def test_errors_count_unless_the_scheduler_was_dead() -> None:
    def record(result: Outcome, started: float, ended: float) -> Record:
        return Record("k", "whole", result, "", started, ended)

    run = Run(kills=[Kill("SIGKILL", 10.0, recovered=15.0)])
    run.records = [record(Outcome.FAILED, *times) for times in ((9, 11), (12, 13), (14, 20))]
    assert run.violations() == []
    run.records = [record(Outcome.FAILED, *times) for times in ((8, 9), (16, 17))]
    run.records += [record(Outcome.WRONG, 12, 13), record(Outcome.LOST, 12, 13)]
    assert run.violations() == run.records


def test_traffic_is_the_same_for_the_same_seed() -> None:
    first, second = (Traffic(7, 1000, 2000) for _ in range(2))
    jobs = [(first.job(), second.job()) for _ in range(200)]
    for a, b in jobs:
        assert (a.kind, a.conduct, a.rid, a.body) == (b.kind, b.conduct, b.rid, b.body)
    assert len({a.kind for a, _ in jobs}) == 11
