"""Typed one-way ZMQ channels (PUSH/PULL over ipc) between the two processes.

A message that cannot be read ends neither process: the receiver says what is known of it
(``UnreadableMessage``) and goes on. A sender refuses what the receiver would not take.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import msgspec
import zmq

M = TypeVar("M")

logger = logging.getLogger(__name__)

# Far above any real message; a receiver drops the connection of a peer that sends more.
MAX_MESSAGE_BYTES = 256 << 20

# How a struct with a tag begins, when not even its msgpack is intact, and the keys that can follow.
_TAG = re.compile(rb"[\x80-\x8f]\xa4type[\xa0-\xbf](?P<tag>[A-Za-z]+)(?=[\xa0-\xbf])")
_RID = re.compile(rb"\xa3rid(?:[\xa0-\xbf]|\xd9(?P<short>.)|\xda(?P<long>..))", re.DOTALL)
_KEY = re.compile(rb"[\xa0-\xbf](?P<key>[a-z_]+)")


class MessageTooLarge(ValueError):
    """A message has more bytes than its receiver takes. It was not sent."""


class UnreadableMessage(Exception):
    """A message could not be decoded.

    Attributes
    ----------
    tag : which message it is by its own account, "" if not even that can be read
    rids : the requests it concerns, None if they cannot be known
    """

    def __init__(self, raw: bytes, error: Exception) -> None:
        self.tag, self.rids = _concerned(raw)
        super().__init__(f"unreadable message {self.tag or '?'} of {len(raw)} bytes: {error}")


class Sender(Generic[M]):
    """Blocking-free sender: PUSH queues in memory, order is kept."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        max_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._max_bytes = max_bytes

    def send(self, message: M) -> None:
        """Queue a message.

        Raises
        ------
        MessageTooLarge
            If the receiver would not take it; nothing is sent.
        """
        raw = self._encoder.encode(message)
        if len(raw) > self._max_bytes:
            kind = type(message).__name__
            raise MessageTooLarge(
                f"a {kind} of {len(raw)} bytes is over the limit of {self._max_bytes}"
            )
        self._socket.send(raw)

    def close(self, linger_ms: int | None = None) -> None:
        """Close the socket; what is queued is still sent for up to ``linger_ms``."""
        self._socket.close(linger=linger_ms)


class Receiver(Generic[M]):
    """Receiving end for a synchronous loop. ``union`` is the message union it decodes.

    Attributes
    ----------
    on_unreadable : called with each message that cannot be decoded; logs it by default
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, union: Any) -> None:
        self._socket = _bound(context, address)
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._injected: list[M] = []
        self.on_unreadable: Callable[[UnreadableMessage], None] = logger.error

    def inject(self, message: M) -> None:
        """Have ``drain`` yield a message that this process sends to itself."""
        self._injected.append(message)

    def drain(self, timeout_ms: int = 0) -> Iterator[M]:
        """Yield every message that has arrived; wait up to ``timeout_ms`` for the first."""
        while self._injected:
            yield self._injected.pop(0)
        if timeout_ms and not self._socket.poll(timeout_ms):
            return
        while True:
            try:
                raw = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = _decode(self._decoder, raw)
            except UnreadableMessage as error:
                self.on_unreadable(error)
            else:
                yield message

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncReceiver(Generic[M]):
    """Receiving end for asyncio, for one task.

    The event loop watches the socket's descriptor itself: ``zmq.asyncio`` takes several callbacks
    and futures for each message, on a core that the engine wants too.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, union: Any) -> None:
        self._socket = _bound(context, address)
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._arrived: deque[bytes] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def receive(self) -> M:
        """The next message.

        Raises
        ------
        UnreadableMessage
            If it cannot be decoded; the one after it can be received.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.fileno(), self._take)
            self._take()
        while not self._arrived:
            self._waiting = self._loop.create_future()
            await self._waiting
        return _decode(self._decoder, self._arrived.popleft())

    def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close(linger=0)

    def _take(self) -> None:
        # The descriptor tells of changes only: whatever has arrived must be taken.
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._arrived.append(self._socket.recv(zmq.NOBLOCK))
        if self._arrived and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def _bound(context: Any, address: str) -> Any:
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.bind(address)
    return socket


def _decode(decoder: msgspec.msgpack.Decoder[M], raw: bytes) -> M:
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UnreadableMessage(raw, error) from error


def _concerned(raw: bytes) -> tuple[str, list[str] | None]:
    """Tag and request ids of a message that does not fit its schema or is cut off."""
    try:
        content = msgspec.msgpack.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _header(raw)
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        return "", None
    if "outputs" not in content:
        rid = content.get("rid")
        return content["type"], [rid] if isinstance(rid, str) else []
    rids: list[str] = []
    for output in content["outputs"] if isinstance(content["outputs"], list) else [None]:
        if not isinstance(output, dict) or not isinstance(output.get("rid"), str):
            return content["type"], None
        rids.append(output["rid"])
    return content["type"], rids


def _header(raw: bytes) -> tuple[str, list[str] | None]:
    tag = _TAG.match(raw)
    if tag is None:
        return "", None
    name = tag["tag"].decode()
    key = _KEY.match(raw, tag.end())
    if key is not None and key["key"] not in (b"rid", b"outputs"):
        # About no request; cut off within the key, it could still have been.
        return name, [] if key.end() < len(raw) else None
    found = _RID.match(raw, tag.end())
    if found is None:
        return name, None
    size = found["short"] or found["long"]
    length = int.from_bytes(size, "big") if size else raw[found.end() - 1] - 0xA0
    rid = raw[found.end() : found.end() + length]
    return name, [rid.decode(errors="replace")] if len(rid) == length else None
