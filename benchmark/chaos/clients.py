"""Clients that behave as told, and what became of their requests."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import aiohttp

from benchmark.chaos.traffic import Job

# A request without its end after this long counts as lost.
PATIENCE_S = 150.0
_SLOW_BYTES = 64
_SLOW_PAUSE_S = 0.02
_SLOW_LIMIT_S = 10.0


class Outcome(StrEnum):
    """How a request ended. Only the last two are the server's fault."""

    ANSWERED = "answered"
    REFUSED = "refused as it must be"
    ABORTED = "aborted as asked"
    LEFT = "left by its client"
    FAILED = "failed with an error"
    WRONG = "answered wrongly"
    LOST = "never answered"


@dataclass(frozen=True)
class Record:
    """One request, from start to end, by ``time.monotonic``."""

    kind: str
    conduct: str
    outcome: Outcome
    detail: str
    started: float
    ended: float


class _End(Exception):
    def __init__(self, outcome: Outcome, detail: str = "") -> None:
        self.outcome = outcome
        self.detail = detail


async def run_job(http: aiohttp.ClientSession, url: str, job: Job, rng: random.Random) -> Record:
    """Send one request and see it through in its client's way."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await _conduct(http, url, job, rng)
        end = _End(Outcome.ANSWERED)
    except _End as reached:
        end = reached
    except TimeoutError:
        end = _End(Outcome.LOST, f"no end within {PATIENCE_S:g} s")
    except (aiohttp.ClientError, OSError) as error:
        end = _End(Outcome.FAILED, f"{type(error).__name__}: {error}")
    except (ValueError, KeyError, TypeError) as error:
        end = _End(Outcome.WRONG, f"not a reply: {error!r}")
    return Record(job.kind, job.conduct, end.outcome, end.detail, started, time.monotonic())


async def _conduct(http: aiohttp.ClientSession, url: str, job: Job, rng: random.Random) -> None:
    if job.conduct == "whole":
        await _read_whole(http, url, job)
    elif job.conduct == "leave":
        await _leave(http, url, job, rng.uniform(0.0, 2.0))
    elif job.conduct == "abort":
        await _have_aborted(http, url, job, rng.uniform(0.0, 2.0))
    else:
        leave_after = rng.randint(1, 20) if job.conduct == "leave-stream" else None
        await _read_stream(http, url, job, leave_after, slow=job.conduct == "slow")


async def _read_whole(http: aiohttp.ClientSession, url: str, job: Job) -> None:
    async with http.post(url + job.path, json=job.body) as response:
        await _check_status(response, job)
        reply = await response.json()
    if job.path != "/generate":
        _check_chat([choice["finish_reason"] for choice in reply["choices"]])
        return
    outputs = reply if isinstance(reply, list) else [reply]
    if len(outputs) != job.outputs:
        raise _End(Outcome.WRONG, f"{len(outputs)} outputs, not {job.outputs}")
    for output in outputs:
        _check_output(output, job)


async def _leave(http: aiohttp.ClientSession, url: str, job: Job, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await _read_whole(http, url, job)
    except TimeoutError:
        raise _End(Outcome.LEFT) from None


async def _have_aborted(http: aiohttp.ClientSession, url: str, job: Job, seconds: float) -> None:
    async def abort() -> None:
        await asyncio.sleep(seconds)
        async with http.post(url + "/abort_request", json={"rid": job.rid}) as response:
            await response.read()

    aborting = asyncio.create_task(abort())
    try:
        await _read_whole(http, url, job)
    finally:
        aborting.cancel()
        await asyncio.gather(aborting, return_exceptions=True)


async def _read_stream(
    http: aiohttp.ClientSession, url: str, job: Job, leave_after: int | None, slow: bool
) -> None:
    ends: dict[int, list[Any]] = {}
    texts: dict[int, str] = {}
    count = 0
    async with http.post(url + job.path, json={**job.body, "stream": True}) as response:
        await _check_status(response, job)
        async for event in _events(response.content, slow):
            if "error" in event:
                raise _End(_of_error(event), json.dumps(event)[:200])
            count += 1
            if leave_after is not None and count >= leave_after:
                response.close()
                raise _End(Outcome.LEFT)
            if job.path != "/generate":
                for choice in event["choices"]:
                    if choice["finish_reason"]:
                        ends.setdefault(choice["index"], []).append(choice["finish_reason"])
                continue
            index = event.get("index", 0)
            if not event["text"].startswith(texts.get(index, "")):
                raise _End(Outcome.WRONG, "a stream took text back")
            texts[index] = event["text"]
            if event["meta_info"]["finish_reason"] is not None:
                ends.setdefault(index, []).append(event)
    if sorted(ends) != list(range(job.outputs)) or any(len(e) != 1 for e in ends.values()):
        raise _End(Outcome.WRONG, f"terminal events: { {i: len(e) for i, e in ends.items()} }")
    for (end,) in ends.values():
        if job.path == "/generate":
            _check_output(end, job)
        else:
            _check_chat([end])


async def _events(content: aiohttp.StreamReader, slow: bool) -> AsyncIterator[dict[str, Any]]:
    """Events up to [DONE], after which nothing may follow."""
    pieces = _slowly(content) if slow else content.iter_any()
    buffer = b""
    done = False
    async for piece in pieces:
        buffer += piece
        *lines, buffer = buffer.split(b"\n\n")
        for line in lines:
            payload = line.removeprefix(b"data:").strip()
            if done:
                raise _End(Outcome.WRONG, "something follows [DONE]")
            if payload == b"[DONE]":
                done = True
            else:
                yield json.loads(payload)
    if not done:
        raise _End(Outcome.FAILED, "the stream ended without [DONE]")


async def _slowly(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """A few bytes at a time; after a while the rest at once, to come to an end."""
    deadline = time.monotonic() + _SLOW_LIMIT_S
    while time.monotonic() < deadline:
        piece = await content.read(_SLOW_BYTES)
        if not piece:
            return
        yield piece
        await asyncio.sleep(_SLOW_PAUSE_S)
    async for piece in content.iter_any():
        yield piece


async def _check_status(response: aiohttp.ClientResponse, job: Job) -> None:
    if response.status == 200 and job.refused is None:
        return
    text = (await response.text())[:200]
    if response.status == 503:
        raise _End(Outcome.FAILED, text)
    if response.status != job.refused:
        raise _End(Outcome.WRONG, f"status {response.status}: {text}")
    raise _End(Outcome.REFUSED)


def _check_output(output: dict[str, Any], job: Job) -> None:
    finish = output["meta_info"]["finish_reason"]
    if finish["type"] == "abort":
        raise _End(
            Outcome.ABORTED if job.conduct == "abort" else Outcome.WRONG, finish.get("message", "")
        )
    if job.outputs == 1 and output["meta_info"]["id"] != job.rid:
        raise _End(Outcome.WRONG, f"the reply to {output['meta_info']['id']}")
    if (wrong := job.check(output)) is not None:
        raise _End(Outcome.WRONG, wrong)


def _check_chat(reasons: list[Any]) -> None:
    if len(reasons) != 1 or reasons[0] not in ("stop", "length"):
        raise _End(Outcome.WRONG, f"finish reasons {reasons}")


def _of_error(event: dict[str, Any]) -> Outcome:
    return Outcome.FAILED if event["error"].get("code") == 503 else Outcome.WRONG
