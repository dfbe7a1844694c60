"""Decides what the next step computes: who decodes, who prefills, who is admitted or retracted."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tca_runtime.cache.manager import CacheManager
from tca_runtime.config import SchedulerArgs
from tca_runtime.messages import FinishReason
from tca_runtime.scheduler.pace import PrefillPace
from tca_runtime.scheduler.request import Request
from tca_runtime.scheduler.stretches import stretch_at
from tca_runtime.scheduler.waiting import WaitingQueue, find_prefix

logger = logging.getLogger(__name__)

# Free tokens kept per running request at admission, so that it is not retracted soon after.
DECODE_RESERVE = 32
# Room in a new view beyond the prompt; longer outputs grow it.
VIEW_HEADROOM = 256
# Tokens that a chunk sees and that take as long to read, once per chunk, as one takes to compute.
PAST_PER_TOKEN = {"cpu": 16, "cuda": 256}
# A prompt that would share this many more tokens with one being prefilled waits for it.
WORTH_WAITING = 64


@dataclass(frozen=True)
class PlannedChunk:
    """Prompt tokens ``[begin, end)`` of a request, with slots taken; see ``Stretch.sees_past``.

    ``weight`` is how many prompt tokens near a prompt's begin take about as long.
    """

    request: Request
    begin: int
    end: int
    slots: Tensor
    sees_past: bool
    weight: int

    @property
    def size(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class StepPlan:
    """Requests that decode one token each, and chunks that prefill.

    ``layered`` are chunks for which the decoding requests should not wait: they are computed a few
    layers at a time between this step and later ones. On a CPU that is one that cannot be cut, or
    not with profit, and takes too long; on a GPU all of them.
    """

    decode: list[Request]
    chunks: list[PlannedChunk]
    layered: Sequence[PlannedChunk] = ()

    @property
    def is_empty(self) -> bool:
        return not self.decode and not self.chunks

    @property
    def requests(self) -> list[Request]:
        """Whose slots the step reads and writes."""
        return [*self.decode, *(chunk.request for chunk in self.chunks)]


class StepPlanner:
    """Continuous batching over one cache.

    A request is waiting, then prefilling, then running; one that ended is leaving until no step
    in flight uses its slots. Prefilling ones take a shared budget of
    tokens per step. Slots are taken when a chunk is planned, not at admission; when they run out,
    the newest request is retracted: its tokens go to the tree (evictable), it waits again, and it
    resumes from what is still cached.
    """

    def __init__(self, args: SchedulerArgs, cache: CacheManager) -> None:
        self._args = args
        self._cache = cache
        device = cache.pool.kv.device.type
        self._chunk = args.chunk_on(device)
        self._past_per_token = PAST_PER_TOKEN[device]
        self.pace = PrefillPace(args, device)
        self.waiting = WaitingQueue(args.schedule_policy)
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self.leaving: list[Request] = []
        self.num_retractions = 0
        self.num_raised = 0
        self._refused: tuple[int, ...] = ()
        self._refused_room = 0

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.running or self.leaving)

    @property
    def num_prompts(self) -> int:
        """Requests whose prompt is being computed or could be."""
        places = self._args.max_running_requests - len(self.running) - len(self.prefilling)
        ready = sum(request.grammar is None for request in self.waiting)
        return len(self.prefilling) + min(ready, places)

    @property
    def spare(self) -> float:
        """Seconds of other work beside the next decode step."""
        return self.pace.spare(len(self.running), self.num_prompts)

    def active(self) -> list[Request]:
        """Every request that has not ended."""
        return [*self.waiting, *self.prefilling, *self.running]

    def plan(self, may_retract: bool = True, may_prefill: bool = True) -> StepPlan:
        """Choose and allocate the next step.

        While a step is in flight its requests must not be retracted. The plan is empty then where
        one would have to give way: the caller plans again when that step has been consumed.
        No prompt prefills while other chunks are computed layer by layer.
        """
        if not may_retract and not self._reserve():
            return StepPlan([], [])
        if not may_prefill:
            return StepPlan(self._plan_decode(), [])
        decode: list[Request] = []
        num_prompts = self.num_prompts
        if self._args.mixed_batches or not (self.waiting or self.prefilling):
            decode = self._plan_decode()
        # Streams that sit this step out wait for it like the others.
        busy = len(self.running) if self._args.mixed_batches else len(decode)
        budget = allowed = self.pace.budget(busy, num_prompts)
        prompts: list[PlannedChunk] = []
        for request in [r for r in self.prefilling if r.missing]:
            budget -= self._plan_chunk(request, budget, prompts, bool(busy))
        self._admit(budget, prompts, bool(busy))
        paced = busy and self._args.max_decode_slowdown
        too_long = len(prompts) == 1 and prompts[0].weight > allowed
        if paced and (too_long or (prompts and self.pace.is_layered)):
            return StepPlan(decode, [], prompts)
        if not prompts and not decode and self.running:
            decode = self._plan_decode()
        stuck = not prompts and not decode and any(r.finish is None for r in self.prefilling)
        if stuck and may_retract:
            # Half-computed prompts block one another: the newest gives way.
            self._retract(max(self.prefilling, key=lambda r: r.arrival))
        return StepPlan(decode, prompts)

    def prefilled(self, request: Request) -> None:
        """The request's prompt is computed; it decodes from now on."""
        self.prefilling.remove(request)
        self.running.append(request)

    def draw_again(self) -> None:
        """Send requests that were not sure back to wait, once no step draws for them.

        What they have computed stays cached. As behind any cached prefix their last tokens see
        everything, draw the next one and select what is decoded with.
        """
        for request in [r for r in self.running if r.unsure and not r.num_pending]:
            self._release(request)
            self.running.remove(request)
            self.num_raised += 1
            request.back_to_waiting()
            self.waiting.add(request)

    def leave(self, ended: list[Request]) -> None:
        """Plan these requests no more; what they hold stays theirs until ``release_left``."""
        gone = set(ended)
        self.waiting.remove(gone)
        self.prefilling = [r for r in self.prefilling if r not in gone]
        self.running = [r for r in self.running if r not in gone]
        self.leaving += ended

    def release_left(self, in_flight: Collection[Request]) -> None:
        """Let requests go that ended and are in no step in flight."""
        for request in self.leaving:
            if request not in in_flight:
                self._release(request)
        self.leaving = [r for r in self.leaving if r in in_flight]

    def _release(self, request: Request) -> None:
        """Give back what the request holds; its computed tokens stay cached."""
        if request.sequence is not None:
            self._cache.release(request.namespace, request.sequence, request.cacheable)
            request.sequence = None

    def _decoding(self) -> list[Request]:
        return [r for r in self.running if r.can_decode]

    def _reserve(self) -> bool:
        return self._cache.reserve([r.sequence for r in self._decoding() if r.sequence])

    def _plan_decode(self) -> list[Request]:
        while self.running and not self._reserve():
            self._retract(max(self.running, key=lambda r: r.arrival))
        return self._decoding()

    def _plan_chunk(
        self, request: Request, budget: int, chunks: list[PlannedChunk], busy: bool
    ) -> int:
        """Plan the next tokens of an admitted request; returns what they weigh.

        ``busy``: others decode.
        """
        assert request.sequence is not None
        begin = request.sequence.computed
        stretch = stretch_at(request, begin, self._chunk)
        whole, available = stretch.end - begin, self._cache.available_tokens
        # Far into a prompt, small chunks would read everything before them again and again.
        least = min(begin // self._past_per_token, self._chunk) if busy else 0
        if not chunks:
            # What comes first in a step may exceed the budget.
            budget = available if stretch.last_cut == begin else max(budget, least)
        elif least > budget:
            return 0
        room = min(budget, available)
        count = whole if whole <= room else min(room, stretch.last_cut - begin)
        if count <= 0:
            return 0
        slots = self._cache.extend(request.sequence, count)
        weight = max(count, least)
        chunks.append(PlannedChunk(request, begin, begin + count, slots, stretch.sees_past, weight))
        return weight

    def _admit(self, budget: int, chunks: list[PlannedChunk], busy: bool) -> None:
        taken = len(self.running) + len(self.prefilling) + len(self.leaving)
        room = self._args.max_running_requests - taken
        if not len(self.waiting) or room <= 0 or budget <= 0:
            return
        state = self._admission_state()
        available = self._cache.available_tokens
        others = self.running or self.prefilling
        if others and state == self._refused and available <= self._refused_room:
            return
        admitted: set[Request] = set()
        ranked = self.waiting.ranked(self._cache)
        for request in ranked:
            if budget <= 0 or len(admitted) == room:
                break
            if self._should_wait(request):
                continue
            if not self._begin(request):
                break
            admitted.add(request)
            self.prefilling.append(request)
            planned = self._plan_chunk(request, budget, chunks, busy)
            if request.missing and not planned:
                # What it holds cannot be evicted: no others before it is computed.
                break
            budget -= planned
        self._refused, self._refused_room = (() if admitted else state), available
        if admitted:
            newest = max(r.arrival for r in admitted)
            for request in ranked:
                if request not in admitted and request.arrival < newest:
                    request.skipped += 1
            self.waiting.remove(admitted)

    def _admission_state(self) -> tuple[int, ...]:
        """What admission depends on, besides room for tokens.

        While none of it changes, a queue that was refused need not be matched with the tree anew,
        which takes longer than the rest of a decode step's planning.
        """
        waiting = [request.arrival for request in self.waiting if request.grammar is None]
        return (
            len(waiting),
            max(waiting, default=0),
            len(self.prefilling),
            len(self.running),
            len(self.leaving),
            self.num_retractions,
            self._cache.tree.num_tokens,
        )

    def _begin(self, request: Request) -> bool:
        """Lock the request's prefix if the rest of it fits beside the others."""
        match = find_prefix(self._cache, request)
        missing = request.num_tokens - match.num_tokens
        left = request.max_new_tokens - request.num_output
        sequence = self._cache.begin(match, missing + min(left, VIEW_HEADROOM))
        if sequence is None:
            return False
        promised = sum(r.missing for r in self.prefilling)
        promised += DECODE_RESERVE * (len(self.running) + len(self.prefilling))
        alone = not self.running and not self.prefilling
        if not alone and self._cache.available_tokens < missing + promised + DECODE_RESERVE:
            self._cache.release(request.namespace, sequence, request.tokens[: match.num_tokens])
            return False
        request.sequence = sequence
        self.waiting.admit(request, missing)
        if not missing:
            # Nothing to compute and nothing to sample: the whole prompt was cached.
            request.finish = FinishReason("length", length=0)
        if request.cached_tokens is None:
            request.cached_tokens = match.num_tokens
        return True

    def _should_wait(self, request: Request) -> bool:
        """Whether a prompt in prefill will soon give this one a much longer prefix."""
        if not self._cache.share_prefixes:
            return False
        reusable = request.tokens[: request.reusable_tokens]
        shared = 0
        for other in self.prefilling:
            if other.namespace == request.namespace:
                size = min(len(reusable), other.num_tokens)
                differ = np.flatnonzero(reusable[:size] != other.tokens[:size])
                shared = max(shared, int(differ[0]) if len(differ) else size)
        if shared < WORTH_WAITING:
            return False
        return shared - find_prefix(self._cache, request).num_tokens >= WORTH_WAITING

    def _retract(self, request: Request) -> None:
        logger.info("retracting %s: out of KV slots", request.rid)
        self._release(request)
        if request in self.running:
            self.running.remove(request)
        else:
            self.prefilling.remove(request)
        if not request.num_output:
            request.prompt_logprobs = []
        request.num_retractions += 1
        self.num_retractions += 1
        request.back_to_waiting()
        self.waiting.add(request)
