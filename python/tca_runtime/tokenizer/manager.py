"""The tokenizer process' half of the conversation with the scheduler.

One task listens; every open output has a ``RequestState`` under its rid, which only that task
changes. Routes wait on the states of their own call.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import numpy as np
from transformers import PreTrainedTokenizerFast

from tca_runtime.channels import AsyncReceiver, MessageTooLarge, Sender, UnreadableMessage
from tca_runtime.config import RuntimeConfig
from tca_runtime.messages import (
    AbortRequest,
    Control,
    ControlReply,
    FinishReason,
    GenerateRequest,
    Heartbeat,
    SchedulerFailed,
    SchedulerReady,
    TokenBatch,
    TokenOutput,
    ToScheduler,
    ToTokenizer,
)
from tca_runtime.tokenizer.call_limits import check_size
from tca_runtime.tokenizer.chat import ChatTemplate
from tca_runtime.tokenizer.detokenizer import TokenTable
from tca_runtime.tokenizer.encode import Encoder
from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.state import RequestState, TextRequest

logger = logging.getLogger(__name__)

# Called after each change of an output with the number of tokens it brought.
Observer = Callable[[RequestState, int], None]

ControlAction = Literal["flush_cache", "state", "tree", "start_profile", "stop_profile"]

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """What the model can take: longest prompt + output, and the ids it knows.

    ``custom_params``: the keys that the scheduler reads; others are not worth sending.
    """

    context_length: int
    vocab_size: int
    custom_params: tuple[str, ...]


class TokenizerManager:
    """Owns every open request of the HTTP process.

    Parameters
    ----------
    to_scheduler, from_scheduler : the two channels; the manager closes neither.
    info : what ``SchedulerReady`` said; the fields of ``Limits`` are needed.
    heartbeat_timeout : seconds of silence after which the scheduler counts as unhealthy.

    Attributes
    ----------
    failure : why the scheduler is gone, None while it is there.
    draining : whether the server is about to end: what is open goes on, nothing new is taken.
    scheduler_state : the latest heartbeat's figures.
    tokens_received : of all requests, since the start.
    observer : told of every change of an output.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        tokenizer: PreTrainedTokenizerFast,
        to_scheduler: Sender[ToScheduler],
        from_scheduler: AsyncReceiver[ToTokenizer],
        info: dict[str, Any],
        heartbeat_timeout: float = 30.0,
    ) -> None:
        self.served_model_name = config.model.served_model_name or config.model.model_path
        self.limits = Limits(
            info["context_length"], info["vocab_size"], tuple(info["custom_params"])
        )
        self.info = info
        self.table = TokenTable(tokenizer)
        self.encoder = Encoder(tokenizer)
        self.chat_template = ChatTemplate(tokenizer)
        self.scheduler_state: dict[str, Any] = {}
        self.tokens_received = 0
        self.failure: str | None = None
        self.draining = False
        self.observer: Observer = _ignore
        self._to_scheduler = to_scheduler
        self._from_scheduler = from_scheduler
        self._heartbeat_timeout = heartbeat_timeout
        self._last_message = time.monotonic()
        self._states: dict[str, RequestState] = {}
        self._serial = itertools.count()
        self._calls: dict[str, asyncio.Future[ControlReply]] = {}
        self._listener: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen; must be called inside the event loop that serves the requests."""
        self._last_message = time.monotonic()
        self._listener = asyncio.create_task(self._listen(), name="scheduler-listener")

    async def stop(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener

    @property
    def num_open(self) -> int:
        """Outputs that have not finished."""
        return len(self._states)

    @property
    def silence(self) -> float:
        """Seconds since the scheduler was last heard of."""
        return time.monotonic() - self._last_message

    def unhealthy(self) -> str | None:
        """Why requests cannot be served now, or None."""
        if (reason := self._unavailable()) is not None:
            return reason
        if self.silence > self._heartbeat_timeout:
            return f"the scheduler has been silent for {self.silence:.0f} s"
        return None

    async def generate(self, requests: Sequence[TextRequest]) -> AsyncGenerator[RequestState, None]:
        """Run requests and yield a state whenever it has changed, until all have finished.

        Outputs are numbered request by request, the ``n`` of one request side by side. A state
        that changed several times between two iterations is yielded once. Closing the iterator
        early aborts what is still open.

        Raises
        ------
        RequestError
            Before anything is sent, if a request is invalid or the scheduler is not there.
        """
        if (reason := self._unavailable()) is not None:
            raise RequestError(reason, status=503)
        changed = asyncio.Event()
        check_size(requests)
        outputs = [output for request in requests for output in _expand(request)]
        states = [
            RequestState(output, i, str(next(self._serial)), self.table, changed)
            for i, output in enumerate(outputs)
        ]
        try:
            for state in states:
                self._states[state.wire_id] = state
                self._send_request(state)
            remaining = len(states)
            while remaining:
                await changed.wait()
                changed.clear()
                for state in states:
                    if state.updated:
                        state.updated = False
                        remaining -= state.finish is not None
                        yield state
        finally:
            for state in states:
                self._abandon(state)

    def abort(self, rid: str) -> int:
        """Ask the scheduler to end a request, or each output of the call that was named ``rid``.

        An empty ``rid`` means all. The clients get what there is, with finish reason "abort".
        Returns how many outputs were open.
        """
        matching = [
            wire_id
            for wire_id, state in self._states.items()
            if not rid or rid in (state.request.rid, *state.request.part_of)
        ]
        for wire_id in matching:
            self._to_scheduler.send(AbortRequest(rid=wire_id))
        return len(matching)

    async def control(
        self, action: ControlAction, args: dict[str, Any] | None = None, timeout: float = 30.0
    ) -> ControlReply:
        """Ask or tell the scheduler as a whole.

        Raises
        ------
        RequestError
            503 if the scheduler is not there or does not answer in time.
        """
        if self.failure is not None:
            raise RequestError(f"the scheduler process has failed: {self.failure}", status=503)
        call_id = uuid.uuid4().hex
        reply = asyncio.get_running_loop().create_future()
        self._calls[call_id] = reply
        try:
            self._to_scheduler.send(Control(call_id=call_id, action=action, args=args or {}))
            return await asyncio.wait_for(reply, timeout)
        except TimeoutError:
            raise RequestError(
                f"the scheduler did not answer {action!r} within {timeout:g} s", status=503
            ) from None
        finally:
            del self._calls[call_id]

    def fail(self, reason: str) -> None:
        """The scheduler is gone: end every open request and call with an error.

        Only the first reason counts; of a traceback it is the last line.
        """
        if self.failure is not None:
            return
        self.failure = reason.strip().rpartition("\n")[2] or "no reason given"
        logger.error("the scheduler process has failed:\n%s", reason)
        message = f"the scheduler process has failed: {self.failure}"
        self._end_open(list(self._states), message, 503)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(RequestError(message, status=503))

    async def revive(
        self,
        to_scheduler: Sender[ToScheduler],
        from_scheduler: AsyncReceiver[ToTokenizer],
        info: dict[str, Any],
    ) -> None:
        """Serve again, over the channels of a new scheduler; the old ones can be closed."""
        await self.stop()
        self._to_scheduler = to_scheduler
        self._from_scheduler = from_scheduler
        self.info = info
        self.scheduler_state = {}
        self.failure = None
        self.start()

    def end_open(self, message: str, status: int) -> None:
        """End every open request with an error; the scheduler is told to forget them."""
        for wire_id in self._end_open(list(self._states), message, status):
            self._to_scheduler.send(AbortRequest(rid=wire_id))

    def _end_open(self, wire_ids: Sequence[str], message: str, status: int) -> list[str]:
        ended = [wire_id for wire_id in wire_ids if wire_id in self._states]
        for wire_id in ended:
            state = self._states.pop(wire_id)
            self._finish(state, FinishReason("abort", message=message, status=status))
        return ended

    def _unavailable(self) -> str | None:
        if self.failure is not None:
            return f"the scheduler process has failed: {self.failure}"
        return "the server is shutting down" if self.draining else None

    def _send_request(self, state: RequestState) -> None:
        try:
            self._to_scheduler.send(_message(state))
        except MessageTooLarge as error:
            raise RequestError(str(error), status=413) from None

    async def _listen(self) -> None:
        try:
            while True:
                try:
                    message = await self._from_scheduler.receive()
                except UnreadableMessage as error:
                    self._end_unreadable(error)
                else:
                    self._handle(message)
        except Exception as error:
            # Without the listener no request would ever end.
            logger.exception("cannot read from the scheduler")
            self.fail(f"the listener broke off: {error!r}")

    def _end_unreadable(self, error: UnreadableMessage) -> None:
        """End the requests that a message was about: part of their output is lost.

        All of them if it is not known which: any may have missed its end.
        """
        logger.error("%s", error)
        self._last_message = time.monotonic()
        wire_ids = list(self._states) if error.rids is None else error.rids
        for wire_id in self._end_open(wire_ids, "a part of the reply was lost", 500):
            self._to_scheduler.send(AbortRequest(rid=wire_id))

    def _handle(self, message: ToTokenizer) -> None:
        self._last_message = time.monotonic()
        match message:
            case TokenBatch(outputs=outputs):
                for output in outputs:
                    self._take(output)
            case ControlReply(call_id=call_id):
                call = self._calls.get(call_id)
                if call is not None and not call.done():
                    call.set_result(message)
            case Heartbeat(state=state):
                self.scheduler_state = state
            case SchedulerReady(info=info):
                self.info = info
            case SchedulerFailed(traceback=traceback, reason=reason):
                self.fail(reason or traceback)

    def _take(self, output: TokenOutput) -> None:
        self.tokens_received += len(output.token_ids)
        state = self._states.get(output.rid)
        if state is None:
            return
        before = len(state.output_ids)
        try:
            state.apply(output)
        except RequestError as error:
            self._finish(state, FinishReason("abort", message=error.message, status=error.status))
        except Exception:
            logger.exception("request %s", state.wire_id)
            self._finish(
                state, FinishReason("abort", message="internal error in detokenisation", status=500)
            )
        else:
            self.observer(state, len(state.output_ids) - before)
        if state.finish is not None:
            del self._states[output.rid]
            if output.finish is None:
                self._to_scheduler.send(AbortRequest(rid=output.rid))

    def _finish(self, state: RequestState, reason: FinishReason) -> None:
        state.fail(reason)
        self.observer(state, 0)

    def _abandon(self, state: RequestState) -> None:
        if self._states.pop(state.wire_id, None) is not None:
            self._to_scheduler.send(AbortRequest(rid=state.wire_id))
            self._finish(state, FinishReason("abort", message="the client has gone"))


def _ignore(state: RequestState, new_tokens: int) -> None:
    pass


def _expand(request: TextRequest) -> list[TextRequest]:
    sampling = request.sampling
    if sampling.n == 1:
        return [request]
    return [
        replace(
            request,
            rid=f"{request.rid}_{i}",
            part_of=(*request.part_of, request.rid),
            sampling=msgspec.structs.replace(sampling, n=1, seed=_derived(sampling.seed, i)),
        )
        for i in range(sampling.n)
    ]


def _derived(seed: int | None, index: int) -> int | None:
    return None if seed is None else (seed + index) & _MAX_SEED


def _message(state: RequestState) -> GenerateRequest:
    request = state.request
    return GenerateRequest(
        rid=state.wire_id,
        input_ids=np.asarray(request.input_ids, dtype="<i4").tobytes(),
        sampling=request.sampling,
        logprobs=request.logprobs,
        extra_key=request.extra_key,
        priority=request.priority,
        # Stops are found in the text, which grows here.
        incremental=bool(request.stream or request.sampling.stop or request.sampling.stop_regex),
        client=request.client,
    )
