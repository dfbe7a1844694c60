"""Replies that end early when the client goes: server-sent events and long waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from typing import TypeVar

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from tca_runtime.server.errors import ClientGone, stream_error
from tca_runtime.tokenizer.errors import RequestError

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


def event(content: object) -> bytes:
    return b"data: " + _encoder.encode(content) + b"\n\n"


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Await ``work``, but cancel it when the client disconnects.

    Raises
    ------
    ClientGone
        If the client was faster.
    """
    task = asyncio.current_task()
    assert task is not None
    working, lost = True, False

    def on_gone(watcher: asyncio.Task[None]) -> None:
        nonlocal lost
        if working and not watcher.cancelled():
            lost = True
            task.cancel()

    # The work stays in this task: one of its own would cost two switches more.
    watcher = asyncio.create_task(_disconnected(receive))
    watcher.add_done_callback(on_gone)
    try:
        return await work
    except asyncio.CancelledError:
        if lost and task.cancelling() == 1:
            raise ClientGone from None
        raise
    finally:
        working = False
        if lost:
            task.uncancel()
        watcher.cancel()


async def stream_reply(request: Request, events: AsyncGenerator[bytes, None]) -> Response:
    """Stream events, then ``[DONE]``.

    What goes wrong before the first event is raised, so that it gets an HTTP status; what goes
    wrong later becomes an event of its own.
    """
    try:
        first = await until_disconnect(request.receive, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(_guarded(first, events, request.scope))


async def _guarded(
    first: bytes, events: AsyncGenerator[bytes, None], scope: Scope
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        yield first
        try:
            async for chunk in events:
                yield chunk
        except RequestError as error:
            yield event(stream_error(scope, error.message, error.status))
        except Exception:
            logger.exception("a stream broke off")
            yield event(stream_error(scope, "internal server error", 500))
        yield DONE


class EventStream(Response):
    """A streaming response that closes its source as soon as the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        self._chunks = chunks
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            with suppress(ClientGone):
                await until_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
