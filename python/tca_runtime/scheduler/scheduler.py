"""The scheduler's loop: take messages, plan a step, run it, answer."""

from __future__ import annotations

import itertools
import logging
import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tca_runtime.channels import Receiver, Sender
from tca_runtime.config import RuntimeConfig
from tca_runtime.engine.grammar import GrammarCompiler, GrammarError
from tca_runtime.engine.sampler import RowSampling
from tca_runtime.engine.step import (
    ChunkInput,
    DecodeInput,
    PositionLogprobs,
    StepInput,
    StepOutput,
)
from tca_runtime.messages import (
    AbortRequest,
    Control,
    FinishReason,
    GenerateRequest,
    Heartbeat,
    TokenBatch,
    ToScheduler,
    ToTokenizer,
)
from tca_runtime.scheduler.control import ControlHandler
from tca_runtime.scheduler.planner import PlannedChunk, StepPlan, StepPlanner
from tca_runtime.scheduler.request import Request, token_buffer
from tca_runtime.scheduler.results import check_finish, take_output

if TYPE_CHECKING:
    from tca_runtime.engine.engine import Engine

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
IDLE_POLL_MS = 200


class Scheduler:
    """Owns every request between its message and its terminal reply.

    A request ends in one place, ``_end``: finishing, failing and aborting only set
    ``Request.finish``, which is acted on when no step is in flight.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        engine: Engine,
        grammars: GrammarCompiler,
        inbox: Receiver[ToScheduler],
        outbox: Sender[ToTokenizer],
        context_length: int,
    ) -> None:
        self.engine = engine
        self.planner = StepPlanner(config.scheduler, engine.cache)
        self._grammars = grammars
        self._inbox = inbox
        self._outbox = outbox
        self._context_length = context_length
        self._max_queued = config.scheduler.max_queued_requests
        self._eos_ids = frozenset(engine.model_config.eos_token_ids)
        self._arrivals = itertools.count()
        self._seeds = random.Random(config.scheduler.random_seed)
        self._control = ControlHandler(self, engine)
        self._last_heartbeat = 0.0
        self._checked_idle = False

    def run_forever(self) -> None:
        while True:
            self.run_once()

    def run_once(self) -> None:
        """One iteration: messages in, at most one step, replies out."""
        waits = self.planner.is_idle or not self._has_work()
        for message in self._inbox.drain(IDLE_POLL_MS if waits else 0):
            self._handle(message)
        self._end_finished()
        plan = self.planner.plan()
        if not plan.is_empty:
            started = time.perf_counter()
            output = self.engine.run(self._step_input(plan))
            self._consume(plan, output)
            self._control.record_step(plan, time.perf_counter() - started)
        self._idle_check()
        self._beat()

    def state(self) -> dict[str, Any]:
        """Load and cache figures, for heartbeats and ``/server_info``."""
        return self._control.state()

    def _has_work(self) -> bool:
        waiting = any(r.grammar is None or r.grammar.done() for r in self.planner.waiting)
        return waiting or bool(self.planner.running or self.planner.prefilling)

    def _handle(self, message: ToScheduler) -> None:
        if isinstance(message, GenerateRequest):
            self._accept(message)
        elif isinstance(message, AbortRequest):
            for request in self.planner.active():
                if not message.rid or request.rid == message.rid:
                    request.finish = FinishReason("abort", message="aborted", status=499)
        elif isinstance(message, Control):
            self._outbox.send(self._control.handle(message))

    def _accept(self, message: GenerateRequest) -> None:
        prompt = np.frombuffer(message.input_ids, dtype="<i4").astype(np.int32)
        capacity = self.engine.cache.capacity_tokens
        limit = min(self._context_length, capacity) - len(prompt)
        params = message.sampling
        max_new = max(0, min(params.max_new_tokens, limit))
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(62)
        request = Request(
            message=message,
            arrival=next(self._arrivals),
            max_new_tokens=max_new,
            sampling=RowSampling(params, seed, prompt, self._eos_ids),
            tokens=token_buffer(prompt, max_new),
            num_prompt=len(prompt),
            num_tokens=len(prompt),
        )
        request.finish = self._refusal(request, limit, capacity)
        if request.finish is not None:
            self._outbox.send(TokenBatch(outputs=[take_output(request)]))
            return
        if params.grammar is not None and max_new:
            request.grammar = self._grammars.submit(params.grammar)
        self._checked_idle = False
        self.planner.waiting.add(request)

    def _refusal(self, request: Request, limit: int, capacity: int) -> FinishReason | None:
        if limit < (1 if request.message.sampling.max_new_tokens else 0):
            text = (
                f"the prompt has {request.num_prompt} tokens; the context holds "
                f"{self._context_length} and the KV cache {capacity}, output included"
            )
            return FinishReason("abort", message=text, status=400)
        if len(self.planner.waiting) >= self._max_queued:
            text = f"{self._max_queued} requests are waiting already"
            return FinishReason("abort", message=text, status=503)
        return None

    def _step_input(self, plan: StepPlan) -> StepInput:
        decode = []
        for request in plan.decode:
            assert request.sequence is not None
            token = int(request.tokens[request.num_tokens - 1])
            decode.append(DecodeInput(request.sequence, token, request.sampling, request.wish))
        return StepInput(decode, [self._chunk_input(chunk) for chunk in plan.chunks])

    def _chunk_input(self, chunk: PlannedChunk) -> ChunkInput:
        request = chunk.request
        assert request.sequence is not None
        last = chunk.end == request.num_tokens and request.max_new_tokens > 0
        first_wanted = max(chunk.begin + 1, request.logprob_start, 1)
        stop = min(chunk.end + 1, request.num_prompt)
        targets = None
        if not request.num_output and first_wanted < stop:
            targets = request.tokens[first_wanted:stop]
        return ChunkInput(
            sequence=request.sequence,
            tokens=request.tokens[chunk.begin : chunk.end],
            slots=chunk.slots,
            sampling=request.sampling if last else None,
            logprobs=request.wish,
            prompt_offset=first_wanted - 1 - chunk.begin,
            prompt_targets=targets,
        )

    def _consume(self, plan: StepPlan, output: StepOutput) -> None:
        changed: list[Request] = []
        for request, token, entry in zip(
            plan.decode, output.decode_tokens, output.decode_logprobs, strict=True
        ):
            self._append(request, token, entry)
            changed.append(request)
        for chunk, token, entry, prompt in zip(
            plan.chunks,
            output.chunk_tokens,
            output.chunk_logprobs,
            output.prompt_logprobs,
            strict=True,
        ):
            request = chunk.request
            request.prompt_logprobs += prompt
            if chunk.end < request.num_tokens:
                continue
            assert request.sequence is not None
            self.engine.cache.commit(request.namespace, request.sequence, request.all_tokens)
            self.planner.prefilled(request)
            if token is None:
                request.finish = FinishReason("length", length=0)
            else:
                self._append(request, token, entry)
            changed.append(request)
        going = [take_output(r) for r in changed if r.finish is None]
        if going:
            self._outbox.send(TokenBatch(outputs=going))
        self._end_finished()

    def _append(self, request: Request, token: int, entry: PositionLogprobs | None) -> None:
        request.append(token)
        try:
            request.sampling.accept(token)
        except GrammarError as error:
            request.finish = FinishReason("abort", message=str(error), status=error.status)
        if entry is not None:
            request.output_logprobs.append(entry)
        if request.finish is None:
            request.finish = check_finish(request, self._eos_ids)

    def _end_finished(self) -> None:
        """The one place where requests leave: release, forget, terminal reply."""
        self._check_grammars()
        ended = {r for r in self.planner.active() if r.finish is not None}
        if not ended:
            return
        self.planner.remove(ended)
        for request in ended:
            self.planner.release(request)
        self._outbox.send(TokenBatch(outputs=[take_output(r) for r in ended]))

    def _check_grammars(self) -> None:
        """Hand compiled grammars to their requests; a broken one is its client's mistake."""
        for request in self.planner.waiting:
            if request.grammar is None or not request.grammar.done():
                continue
            try:
                request.sampling.matcher = request.grammar.result().matcher()
            except GrammarError as error:
                request.finish = FinishReason("abort", message=str(error), status=error.status)
            request.grammar = None

    def _idle_check(self) -> None:
        if self.planner.is_idle and not self._checked_idle:
            self.engine.cache.check()
            self._checked_idle = True

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._last_heartbeat >= HEARTBEAT_SECONDS:
            self._last_heartbeat = now
            self._outbox.send(Heartbeat(state=self.state()))
