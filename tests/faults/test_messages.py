"""Garbage on the sockets between the processes of a real server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
import zmq

from tca_runtime.channels import MAX_MESSAGE_BYTES
from tca_runtime.messages import AbortRequest, GenerateRequest, Heartbeat, TokenBatch, TokenOutput
from tca_runtime.sampling_params import SamplingParams
from tests.faults.launched import Launched

pytestmark = pytest.mark.slow

encode = msgspec.msgpack.Encoder().encode


@pytest.fixture
def push() -> Iterator[Callable[[str, bytes], None]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def send(address: str, raw: bytes) -> None:
        with context.socket(zmq.PUSH) as socket:
            socket.connect(address)
            socket.send(raw)

    yield send
    context.destroy(linger=2000)


def test_server_survives_garbage(
    launch: Callable[..., Launched], push: Callable[[str, bytes], None]
) -> None:
    server = launch()
    scheduler = server.scheduler()
    bad_ids = GenerateRequest(rid="x", input_ids=b"odd", sampling=SamplingParams())
    unknown = np.asarray([1], dtype="<i4").tobytes()
    batch = TokenBatch(outputs=[TokenOutput(rid="nobody", token_ids=[1])])
    garbage = [
        b"",
        b"\xc1" * 100,
        b"\x91" * 100_000,
        encode(GenerateRequest(rid="y", input_ids=unknown, sampling=SamplingParams()))[:-4],
        encode(AbortRequest(rid="z"))[:-1],
        encode(bad_ids),
        encode(batch),
        encode(batch)[:-2],
        encode(Heartbeat(state={"kv_cache": {}}))[:-1],
        b"\0" * (MAX_MESSAGE_BYTES + 1),
    ]
    for end in ("scheduler", "tokenizer"):
        (address,) = server.sockets(end)
        for raw in garbage:
            push(address, raw)
            # What is open as a cut-off reply arrives ends with it.
            time.sleep(0.2)
            assert server.generate(8).status_code == 200
    assert server.health() == 200
    assert server.process.poll() is None and scheduler.is_running()
    assert server.printed.count("unreadable message") >= 10
    assert server.lost_slots() == 0 and server.info()["num_restarts"] == 0
