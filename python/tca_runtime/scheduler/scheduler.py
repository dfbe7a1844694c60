"""The scheduler's loop: take messages, plan a step, run it, answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tca_runtime.config import RuntimeConfig
from tca_runtime.engine.grammar import GrammarCompiler, GrammarError
from tca_runtime.engine.step import (
    PendingStep,
    PositionLogprobs,
)
from tca_runtime.messages import (
    AbortRequest,
    Control,
    FinishReason,
    GenerateRequest,
    Heartbeat,
    TokenBatch,
    TokenOutput,
    ToScheduler,
    ToTokenizer,
)
from tca_runtime.scheduler.control import ControlHandler
from tca_runtime.scheduler.deadlines import Deadlines
from tca_runtime.scheduler.idle import IdleTime
from tca_runtime.scheduler.inputs import step_input
from tca_runtime.scheduler.intake import Intake, Limits
from tca_runtime.scheduler.layered_prefill import LayeredPrefill
from tca_runtime.scheduler.planner import StepPlan, StepPlanner
from tca_runtime.scheduler.repetition import Repetition
from tca_runtime.scheduler.request import Request
from tca_runtime.scheduler.results import check_finish, is_sure, selection_report, take_output
from tca_runtime.sparsity.chooser import DecodeView

if TYPE_CHECKING:
    from tca_runtime.channels import Receiver, Sender
    from tca_runtime.engine.engine import Engine

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
IDLE_POLL_MS = 200
# Tokens of one request that come faster than this share a message: below what a reader notices,
# and every message wakes the tokenizer process.
STREAM_INTERVAL = 0.02
# Of quiet, before cold prefixes are repeated.
REPEAT_AFTER_SECONDS = 0.3
# While all that is left waits for its grammar.
GRAMMAR_POLL_MS = 5


@dataclass(frozen=True)
class LaunchedPlan:
    """A step on its way through the device.

    ``between`` is how many parts of ``layered`` were launched just before it.
    """

    plan: StepPlan
    step: PendingStep
    started: float
    layered: LayeredPrefill | None = None
    between: int = 0


class Scheduler:
    """Owns every request between its message and its terminal reply.

    On a GPU two steps overlap: step n + 1 is planned and launched while the device computes step
    n, then the tokens of step n are consumed. That works because nothing but the end of a request
    depends on which tokens were drawn: the next step finds them on the device, and slots and views
    have lengths that the host knows. So memory changes hands when a step is launched (``_launch``)
    and tokens when it is consumed (``_consume``). Between two steps some layers of other chunks may
    run (``LayeredPrefill``); all their layers together are a step of their own.

    A request that ended may still be in the step launched before that was known: what is drawn
    for it is dropped, and it leaves its slots when that step has been consumed. A request ends in
    one place, ``_end_finished``: finishing, failing and aborting only set ``Request.finish``.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        engine: Engine,
        grammars: GrammarCompiler,
        inbox: Receiver[ToScheduler],
        outbox: Sender[ToTokenizer],
        context_length: int,
        repetition: Repetition | None = None,
    ) -> None:
        self.engine = engine
        self._repetition = repetition
        self._repeating = False
        self.planner = StepPlanner(config.scheduler, engine.cache)
        self._grammars = grammars
        self._inbox = inbox
        self._outbox = outbox
        self._eos_ids = frozenset(engine.model_config.eos_token_ids)
        self._retention = config.sparsity.tca_retention
        self._intake = Intake(
            Limits(
                context_length,
                engine.cache.capacity_tokens,
                config.scheduler.max_queued_requests,
            ),
            self._eos_ids,
            config.scheduler.random_seed,
            engine.sparsity,
            self._retention,
            engine.cache.share_prefixes,
        )
        self._deadlines = Deadlines(config.scheduler)
        self._control = ControlHandler(self, engine, config)
        self._overlap = engine.is_asynchronous and not config.scheduler.disable_overlap
        self._in_flight: LaunchedPlan | None = None
        self._layered: LayeredPrefill | None = None
        self._consumed_at = 0.0
        self._last_heartbeat = 0.0
        self.stream_interval = STREAM_INTERVAL
        self._idle = IdleTime(engine.cache)

    def run_once(self) -> None:
        """One iteration: messages in, the next step launched, replies of the last one out."""
        for message in self._inbox.drain(self._patience()):
            self._handle(message)
        self._deadlines.mark(self.planner.active)
        self._end_finished()
        self._drop_layered()
        self.planner.draw_again()
        previous, self._in_flight = self._in_flight, self._launch()
        if previous is not None:
            self._consume(previous)
        if self._in_flight is not None:
            self._in_flight.step.sample()
            if not self._overlap:
                self._settle()
        self._idle.note(self.planner.is_idle)
        self._repeat()
        self._beat()

    def state(self) -> dict[str, Any]:
        """Load and cache figures, for heartbeats and ``/server_info``."""
        return self._control.state()

    def _patience(self) -> int:
        """Milliseconds to wait for a message: none while there is something to compute."""
        if self.planner.is_idle:
            return 0 if self._repeating else IDLE_POLL_MS
        waiting = any(r.grammar is None for r in self.planner.waiting)
        planner, under_way = self.planner, self._in_flight or self._layered
        computing = waiting or planner.running or planner.prefilling or under_way
        return 0 if computing else GRAMMAR_POLL_MS

    def _handle(self, message: ToScheduler) -> None:
        if isinstance(message, GenerateRequest):
            self._accept(message)
        elif isinstance(message, AbortRequest):
            for request in self.planner.active():
                wanted = not message.rid or request.rid == message.rid
                if wanted and request.finish is None:
                    request.finish = FinishReason("abort", message="aborted", status=499)
        elif isinstance(message, Control):
            self._settle()
            self._outbox.send(self._control.handle(message))

    def _accept(self, message: GenerateRequest) -> None:
        try:
            request = self._intake.build(message, self.planner.waiting)
        except (ValueError, OverflowError) as error:
            logger.error("request %s does not make sense: %s", message.rid, error)
            reason = FinishReason("abort", message=f"bad request: {error}", status=400)
            output = TokenOutput(rid=message.rid, token_ids=[], finish=reason)
            self._outbox.send(TokenBatch(outputs=[output]))
            return
        if request.finish is not None:
            self._outbox.send(TokenBatch(outputs=[take_output(request)]))
            return
        if message.sampling.grammar is not None and request.max_new_tokens:
            request.grammar = self._grammars.submit(message.sampling.grammar)
        self.planner.waiting.add(request)

    def _launch(self) -> LaunchedPlan | None:
        """Plan a step and start it, behind some layers of other chunks; None without work."""
        started = time.perf_counter()
        layered, between = self._layered, 0
        if layered is not None:
            if layered.is_done:
                # Nothing else now: its tokens have to be drawn before the next step is launched.
                plan, step = StepPlan([], [*layered.chunks]), layered.step.finish()
                self._layered = None
                return self._launched(plan, step, started)
            between = layered.advance(self.planner.spare)
        plan = self.planner.plan(
            may_retract=self._in_flight is None and layered is None, may_prefill=layered is None
        )
        launched = None
        if not plan.is_empty:
            launched = self._launched(plan, self.engine.launch(step_input(plan)), started, between)
        if plan.layered:
            begun = self.engine.begin(step_input(StepPlan([], [*plan.layered])))
            self._layered = LayeredPrefill(plan.layered, begun)
            self._layered.part_seconds = self.planner.pace.part_seconds(self._layered.weight)
        return launched

    def _drop_layered(self) -> None:
        """Compute chunks no further whose requests all ended.

        Layers that were launched have ended when a step launched after them has been consumed.
        """
        layered = self._layered
        if layered is None or any(c.request not in self.planner.leaving for c in layered.chunks):
            return
        if self._overlap and self._in_flight is None:
            return
        self._settle()
        for chunk in layered.chunks:
            if chunk.request.sequence is not None:
                # Not all layers have its K and V: none of it may stay cached.
                chunk.request.sequence.computed = chunk.begin
        self._layered = None

    def _launched(
        self, plan: StepPlan, step: PendingStep, started: float, between: int = 0
    ) -> LaunchedPlan:
        """Requests whose prompt the step completes decode in the next step already."""
        views = step.decode_views
        selected: list[tuple[Request, DecodeView | None]] = []
        for request, view in zip(plan.decode, views, strict=False):
            request.num_pending += 1
            selected.append((request, view))
        for chunk, view in zip(plan.chunks, views[len(plan.decode) :], strict=True):
            request = chunk.request
            # One that ended while its layers were computed is leaving.
            if chunk.end == request.num_tokens and request not in self.planner.leaving:
                self.engine.cache.commit(request.namespace, request.held, request.all_tokens)
                selected.append((request, view))
                self.planner.prefilled(request)
                request.num_pending += request.max_new_tokens > 0
        self._show(selected)
        return LaunchedPlan(plan, step, started, self._layered, between)

    def _settle(self) -> None:
        """Consume the step in flight, if there is one."""
        if self._in_flight is not None:
            launched, self._in_flight = self._in_flight, None
            self._consume(launched)

    def _consume(self, launched: LaunchedPlan) -> None:
        """Wait for a step's tokens, hand them out, reply."""
        plan, step, output = launched.plan, launched.step, launched.step.result()
        self._record(launched)
        for request, token, entry in zip(
            plan.decode, output.decode_tokens, output.decode_logprobs, strict=True
        ):
            request.unsure = request.unsure or not is_sure(request, entry)
            self._append(request, token, entry)
        masses = zip(plan.requests, step.decode_views, output.dropped_mass, strict=True)
        for request, view, mass in masses:
            if view is not None:
                request.tca = selection_report(request, view, mass, self._retention)
        for chunk, prompt in zip(plan.chunks, output.prompt_logprobs, strict=True):
            chunk.request.prompt_logprobs += prompt
        for chunk, sampled, entry in zip(
            plan.chunks, output.chunk_tokens, output.chunk_logprobs, strict=True
        ):
            request = chunk.request
            if sampled is not None:
                self._append(request, sampled, entry)
            elif chunk.end == request.num_tokens and request.finish is None:
                request.finish = FinishReason("length", length=0)
        self._stream(plan.requests)
        self._end_finished()

    def _append(self, request: Request, token: int, entry: PositionLogprobs | None) -> None:
        request.num_pending -= 1
        if request.finish is not None or request.unsure:
            # Known only after this step was launched.
            return
        request.append(token)
        try:
            request.sampling.accept(token)
        except GrammarError as error:
            request.finish = FinishReason("abort", message=str(error), status=error.status)
        if entry is not None and request.message.logprobs is not None:
            request.output_logprobs.append(entry)
        if request.finish is None:
            request.finish = check_finish(request, self._eos_ids)

    def _show(self, selected: Sequence[tuple[Request, DecodeView | None]]) -> None:
        """Let requests decode with the views that their latest queries selected, if they did."""
        cache = self.engine.cache
        for request, view in selected:
            if view is not None or request.is_outdated():
                # A refresh that found nothing to select from is not tried again at once.
                request.selected_at = request.held.computed
        new = [(request, view) for request, view in selected if view is not None]
        if not new:
            return
        shown = cache.show(
            [request.held for request, _ in new],
            [view.lengths for _, view in new],
            [view.slots for _, view in new],
        )
        for fits, (request, view) in zip(shown, new, strict=True):
            if fits and self._retention == "immediate":
                # The ids of the newest tokens may still be on their way.
                sequence = request.held
                cache.commit(request.namespace, sequence, request.all_tokens[: sequence.computed])
                cache.prune(sequence, view.num_tokens, view.slots)

    def _stream(self, requests: list[Request]) -> None:
        """Tell clients of new tokens, those whose request goes on."""
        now = time.monotonic()
        due = [
            r
            for r in requests
            if r.finish is None
            and r.num_sent < r.num_output
            and r.is_due(now, self.stream_interval)
        ]
        for request in due:
            request.sent_at = now
        if due:
            self._outbox.send(TokenBatch(outputs=[take_output(r) for r in due]))

    def _record(self, launched: LaunchedPlan) -> None:
        """Count a step: the time since the last one ended, and tokens that are not dropped."""
        now = time.perf_counter()
        seconds = now - max(launched.started, self._consumed_at)
        self._consumed_at = now
        going = [r for r in launched.plan.decode if r.finish is None]
        done = StepPlan(going, launched.plan.chunks)
        self._control.record_step(done, seconds)
        pace = self.planner.pace
        layered = launched.layered
        if layered is None or not launched.between:
            pace.record(len(done.decode), sum(c.weight for c in done.chunks), seconds)
        elif done.decode and not done.chunks:
            part = layered.note(launched.between, pace.beyond_decode(seconds))
            pace.note_part(layered.weight, part)

    def _end_finished(self) -> None:
        """The one place where requests end: terminal reply, then release.

        What a step in flight still reads and writes is released when it has been consumed.
        """
        self._check_grammars()
        ended = [r for r in self.planner.active() if r.finish is not None]
        for request in ended:
            self._drop_grammar(request)
        if ended:
            self.planner.leave(ended)
            self._outbox.send(TokenBatch(outputs=[take_output(r) for r in ended]))
        if self.planner.leaving:
            busy = set(self._in_flight.plan.requests) if self._in_flight is not None else set()
            if self._layered is not None:
                busy.update(chunk.request for chunk in self._layered.chunks)
            self.planner.release_left(busy)

    def _check_grammars(self) -> None:
        """Hand compiled grammars to their requests; a broken one is its client's mistake."""
        for request in self.planner.waiting:
            if request.grammar is None or not request.grammar.done():
                continue
            # Many requests share the error: raising it would add to its traceback each time.
            error = request.grammar.exception()
            if error is None:
                request.sampling.matcher = request.grammar.result().matcher()
            elif request.finish is None:
                status = error.status if isinstance(error, GrammarError) else 500
                request.finish = FinishReason("abort", message=str(error), status=status)
            self._drop_grammar(request)

    def _drop_grammar(self, request: Request) -> None:
        """Wait for a request's grammar no longer; it is not compiled if nobody else does."""
        future, request.grammar = request.grammar, None
        grammar = request.message.sampling.grammar
        if future is not None and grammar is not None:
            self._grammars.release(grammar, future)

    def _repeat(self) -> None:
        """Repeat a piece of a cold prefix when nothing was asked for a while."""
        idle = self.planner.is_idle and self._in_flight is None
        waited = idle and self._idle.seconds >= REPEAT_AFTER_SECONDS
        self._repeating = waited and self._repetition is not None and self._repetition.advance()

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._last_heartbeat >= HEARTBEAT_SECONDS:
            self._last_heartbeat = now
            self._outbox.send(Heartbeat(state=self.state()))
