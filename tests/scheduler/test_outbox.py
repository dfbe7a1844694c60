"""Replies that are too large for one message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tca_runtime.channels import Receiver
from tca_runtime.messages import (
    ControlReply,
    FinishReason,
    TokenBatch,
    TokenOutput,
    ToTokenizer,
)
from tca_runtime.scheduler.outbox import Outbox

END = FinishReason("length", length=1)


class Line:
    """An outbox for messages of up to 1000 bytes, and what arrives from it."""

    def __init__(self, directory: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        address = f"ipc://{directory}/t"
        self._inbox: Receiver[ToTokenizer] = Receiver(self.context, address, ToTokenizer)
        self.aborted: list[str] = []
        self.outbox = Outbox(self.context, address, self.aborted.append, max_bytes=1000)

    def arrived(self) -> list[ToTokenizer]:
        messages: list[ToTokenizer] = []
        while batch := list(self._inbox.drain(500)):
            messages += batch
        return messages


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    line = Line(tmp_path)
    yield line
    line.context.destroy(linger=0)


def output(rid: str, size: int, finish: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(rid=rid, token_ids=[7] * size, finish=finish)


def outputs(messages: list[ToTokenizer]) -> list[TokenOutput]:
    return [o for m in messages if isinstance(m, TokenBatch) for o in m.outputs]


def test_large_batch_arrives_output_by_output(line: Line) -> None:
    batch = [output(f"r{i}", 600) for i in range(3)]
    line.outbox.send(TokenBatch(outputs=batch))
    assert outputs(line.arrived()) == batch
    assert line.aborted == []


def test_request_with_too_large_an_output_ends_once(line: Line) -> None:
    line.outbox.send(TokenBatch(outputs=[output("big", 2000), output("small", 3)]))
    line.outbox.send(TokenBatch(outputs=[output("big", 1), output("small", 1)]))
    line.outbox.send(TokenBatch(outputs=[output("big", 1, END)]))
    line.outbox.send(TokenBatch(outputs=[output("small", 1, END)]))
    got = outputs(line.arrived())
    (big,) = [o for o in got if o.rid == "big"]
    assert big.finish is not None and (big.finish.type, big.finish.status) == ("abort", 413)
    assert [len(o.token_ids) for o in got if o.rid == "small"] == [3, 1, 1]
    assert line.aborted == ["big"]


def test_too_large_terminal_output_still_ends_its_request(line: Line) -> None:
    line.outbox.send(TokenBatch(outputs=[output("big", 2000, END)]))
    # The name can be used again.
    line.outbox.send(TokenBatch(outputs=[output("big", 1, END)]))
    first, second = outputs(line.arrived())
    assert first.finish is not None and first.finish.status == 413
    assert second.finish == END
    assert line.aborted == []


def test_too_large_control_reply_becomes_a_refusal(line: Line) -> None:
    line.outbox.send(ControlReply(call_id="c", ok=True, message="x" * 2000))
    (reply,) = line.arrived()
    assert isinstance(reply, ControlReply)
    assert reply.call_id == "c" and not reply.ok and "limit of 1000" in reply.message
