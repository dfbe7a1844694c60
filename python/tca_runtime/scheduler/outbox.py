"""What the scheduler sends, in messages that arrive."""

from __future__ import annotations

import logging
from collections.abc import Callable

import zmq

from tca_runtime.channels import MAX_MESSAGE_BYTES, MessageTooLarge, Sender
from tca_runtime.messages import ControlReply, FinishReason, TokenBatch, TokenOutput, ToTokenizer

logger = logging.getLogger(__name__)


class Outbox(Sender[ToTokenizer]):
    """Sends a batch that is too large output by output, and ends a request whose single output is.

    Parameters
    ----------
    abort : told of each request that was ended here; what the scheduler still says of it is
        dropped, so that its terminal reply stays the only one
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        abort: Callable[[str], None],
        max_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(context, address, max_bytes)
        self._abort = abort
        self._ended: set[str] = set()

    def send(self, message: ToTokenizer) -> None:
        if isinstance(message, TokenBatch):
            self._send_outputs(message.outputs)
            return
        try:
            super().send(message)
        except MessageTooLarge as error:
            logger.error("%s", error)
            if isinstance(message, ControlReply):
                super().send(ControlReply(call_id=message.call_id, ok=False, message=str(error)))

    def _send_outputs(self, outputs: list[TokenOutput]) -> None:
        if self._ended:
            outputs = [output for output in outputs if not self._is_ended(output)]
            if not outputs:
                return
        try:
            super().send(TokenBatch(outputs=outputs))
        except MessageTooLarge as error:
            if len(outputs) == 1:
                self._end(outputs[0], error)
                return
            for output in outputs:
                self._send_outputs([output])

    def _end(self, output: TokenOutput, error: MessageTooLarge) -> None:
        logger.error("request %s: %s", output.rid, error)
        text = f"the reply is too large: {error}; ask for fewer logprobs"
        reason = FinishReason("abort", message=text, status=413)
        super().send(TokenBatch(outputs=[TokenOutput(rid=output.rid, token_ids=[], finish=reason)]))
        if output.finish is None:
            self._ended.add(output.rid)
            self._abort(output.rid)

    def _is_ended(self, output: TokenOutput) -> bool:
        if output.rid not in self._ended:
            return False
        if output.finish is not None:
            self._ended.remove(output.rid)
        return True
