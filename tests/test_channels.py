"""Messages that cannot be read or are too large end neither side."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tca_runtime import channels
from tca_runtime.channels import (
    AsyncReceiver,
    MessageTooLarge,
    Receiver,
    Sender,
    UnreadableMessage,
)
from tca_runtime.messages import (
    AbortRequest,
    Control,
    GenerateRequest,
    Heartbeat,
    TokenBatch,
    TokenOutput,
    ToScheduler,
    ToTokenizer,
)
from tca_runtime.sampling_params import SamplingParams

encode = msgspec.msgpack.Encoder().encode
RIDS = ["a", "r" * 31, "r" * 32, "r" * 300, "é£rid"]


def request(rid: str) -> GenerateRequest:
    return GenerateRequest(rid=rid, input_ids=b"\1\0\0\0", sampling=SamplingParams())


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.mark.parametrize("rid", RIDS)
def test_rid_of_a_request_that_does_not_fit_the_schema(rid: str) -> None:
    content = msgspec.msgpack.decode(encode(request(rid)))
    content["sampling"] = "hot"
    error = UnreadableMessage(encode(content), ValueError("x"))
    assert (error.tag, error.rids) == ("GenerateRequest", [rid])


@pytest.mark.parametrize("rid", RIDS)
def test_rid_of_a_request_that_is_cut_off(rid: str) -> None:
    raw = encode(request(rid))
    begin = raw.index(b"\xa3rid") + 4
    for end in range(len(raw)):
        error = UnreadableMessage(raw[:end], ValueError("x"))
        name_is_whole = end >= begin + len(encode(rid))
        assert error.rids == ([rid] if name_is_whole else None)
        assert error.tag in ("", "GenerateRequest")


def test_a_heartbeat_that_is_cut_off_is_about_no_request() -> None:
    raw = encode(Heartbeat(state={"num_running_reqs": 1}))
    begin = raw.index(b"state") + len(b"state")
    for end in range(len(raw)):
        expected = [] if end > begin else None
        assert UnreadableMessage(raw[:end], ValueError("x")).rids == expected


def test_rids_of_a_batch() -> None:
    batch = TokenBatch(outputs=[TokenOutput(rid=rid, token_ids=[1]) for rid in RIDS])
    content = msgspec.msgpack.decode(encode(batch))
    content["outputs"][1]["token_ids"] = "many"
    assert UnreadableMessage(encode(content), ValueError("x")).rids == RIDS
    content["outputs"][1]["rid"] = 7
    assert UnreadableMessage(encode(content), ValueError("x")).rids is None
    # A batch that is cut off may have been about anything.
    assert UnreadableMessage(encode(batch)[:-1], ValueError("x")).rids is None


@settings(max_examples=400, deadline=None)
@given(data=st.data(), union=st.sampled_from([ToScheduler, ToTokenizer]))
def test_any_bytes_are_a_message_or_unreadable(data: st.DataObject, union: Any) -> None:
    messages: list[Any] = [
        request("a"),
        AbortRequest(rid="b"),
        Control(call_id="c", action="state"),
        TokenBatch(outputs=[TokenOutput(rid="d", token_ids=[1, 2])]),
    ]
    raw = bytearray(encode(data.draw(st.sampled_from(messages))))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] + data.draw(st.binary(max_size=8))
    decoder = msgspec.msgpack.Decoder(union)
    try:
        message: Any = channels._decode(decoder, bytes(raw))
    except UnreadableMessage as error:
        assert error.rids is None or all(isinstance(rid, str) for rid in error.rids)
    else:
        assert isinstance(message, union)


def test_receiver_goes_on_after_garbage(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/s"
    receiver: Receiver[ToScheduler] = Receiver(context, address, ToScheduler)
    unreadable: list[UnreadableMessage] = []
    receiver.on_unreadable = unreadable.append
    raw = context.socket(zmq.PUSH)
    raw.connect(address)
    nested = b"\x91" * 100_000
    for garbage in (b"", b"\xc1", b"\x80", nested, encode(request("cut"))[:-3]):
        raw.send(garbage)
    raw.send_multipart([b"two", b"parts"])
    raw.send(encode(AbortRequest(rid="good")))
    got: list[ToScheduler] = []
    while not got:
        got += receiver.drain(5000)
    assert got == [AbortRequest(rid="good")]
    assert [error.rids for error in unreadable] == [None, None, None, None, ["cut"], None, None]


def test_oversized_message_is_refused_by_both_ends(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "MAX_MESSAGE_BYTES", 1000)
    address = f"ipc://{tmp_path}/s"
    receiver: Receiver[ToScheduler] = Receiver(context, address, ToScheduler)
    sender: Sender[ToScheduler] = Sender(context, address, max_bytes=1000)
    with pytest.raises(MessageTooLarge, match="GenerateRequest of .* over the limit of 1000"):
        sender.send(request("x" * 2000))
    rude = context.socket(zmq.PUSH)
    rude.connect(address)
    rude.send(encode(request("x" * 2000)))
    sender.send(AbortRequest(rid="good"))
    assert list(receiver.drain(5000)) == [AbortRequest(rid="good")]
    assert list(receiver.drain(200)) == []


def test_async_receiver_takes_bursts_and_single_messages_in_order(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/asynchronous"
    names = [str(i) for i in range(300)]

    async def receive_all() -> list[str]:
        receiver: AsyncReceiver[ToScheduler] = AsyncReceiver(context, address, ToScheduler)
        sender: Sender[ToScheduler] = Sender(context, address)
        for name in names[:100]:
            sender.send(AbortRequest(rid=name))
        with pytest.raises(TimeoutError):
            # A wait that is given up loses nothing.
            await asyncio.wait_for(_names(receiver, 101), 0.3)
        received = []
        for name in names[100:200]:
            sender.send(AbortRequest(rid=name))
            received += await _names(receiver, 1)
        for name in names[200:]:
            sender.send(AbortRequest(rid=name))
        received += await _names(receiver, 100)
        receiver.close()
        sender.close()
        return received

    assert asyncio.run(receive_all()) == names[100:]


async def _names(receiver: AsyncReceiver[ToScheduler], count: int) -> list[str]:
    messages = [await receiver.receive() for _ in range(count)]
    return [m.rid for m in messages if isinstance(m, AbortRequest)]
