"""Typed one-way ZMQ channels (PUSH/PULL over ipc) between the two processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

M = TypeVar("M")


class Sender(Generic[M]):
    """Blocking-free sender: PUSH queues in memory, order is kept."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: M) -> None:
        self._socket.send(self._encoder.encode(message))

    def close(self) -> None:
        self._socket.close()


class Receiver(Generic[M]):
    """Receiving end for a synchronous loop. ``union`` is the message union it decodes."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, union: Any) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)

    def drain(self, timeout_ms: int = 0) -> Iterator[M]:
        """Yield every message that has arrived; wait up to ``timeout_ms`` for the first."""
        if timeout_ms and not self._socket.poll(timeout_ms):
            return
        while True:
            try:
                raw = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield self._decoder.decode(raw)

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncReceiver(Generic[M]):
    """Receiving end for asyncio."""

    def __init__(self, context: zmq.asyncio.Context, address: str, union: Any) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)

    async def receive(self) -> M:
        return self._decoder.decode(await self._socket.recv())

    def close(self) -> None:
        self._socket.close(linger=0)
