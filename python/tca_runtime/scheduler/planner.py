"""Decides what the next step computes: who decodes, who prefills, who is admitted or retracted."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tca_runtime.cache.manager import CacheManager
from tca_runtime.config import SchedulerArgs
from tca_runtime.messages import FinishReason
from tca_runtime.scheduler.request import Request
from tca_runtime.scheduler.waiting import WaitingQueue, find_prefix

logger = logging.getLogger(__name__)

# Free tokens kept per running request at admission, so that it is not retracted soon after.
DECODE_RESERVE = 32
# Room in a new view beyond the prompt; longer outputs grow it.
VIEW_HEADROOM = 256
# A prompt that would share this many more tokens with one being prefilled waits for it.
WORTH_WAITING = 64


@dataclass(frozen=True)
class PlannedChunk:
    """Prompt tokens ``[begin, end)`` of a request, with slots taken."""

    request: Request
    begin: int
    end: int
    slots: Tensor


@dataclass(frozen=True)
class StepPlan:
    """Requests that decode one token each, and chunks that prefill."""

    decode: list[Request]
    chunks: list[PlannedChunk]

    @property
    def is_empty(self) -> bool:
        return not self.decode and not self.chunks


class StepPlanner:
    """Continuous batching over one cache.

    A request is waiting, then prefilling, then running. Prefilling ones take a shared budget of
    tokens per step. Slots are taken when a chunk is planned, not at admission; when they run out,
    the newest request is retracted: its tokens go to the tree (evictable), it waits again, and it
    resumes from what is still cached.
    """

    def __init__(self, args: SchedulerArgs, cache: CacheManager) -> None:
        self._args = args
        self._cache = cache
        self.waiting = WaitingQueue(args.schedule_policy)
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self.num_retractions = 0

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.running)

    def active(self) -> list[Request]:
        """Every request the scheduler knows."""
        return [*self.waiting, *self.prefilling, *self.running]

    def plan(self) -> StepPlan:
        """Choose and allocate the next step."""
        chunks: list[PlannedChunk] = []
        decode: list[Request] = []
        self._plan_refresh(chunks)
        if self._args.mixed_batches or not (self.waiting or self.prefilling):
            decode = self._plan_decode()
        budget = self._args.chunked_prefill_size
        for request in [r for r in self.prefilling if r.missing]:
            budget -= self._plan_chunk(request, budget, chunks)
        self._admit(budget, chunks)
        if not chunks and not decode and self.running:
            decode = self._plan_decode()
        if not chunks and not decode and any(r.finish is None for r in self.prefilling):
            # Half-computed prompts block one another: the newest gives way.
            self._retract(max(self.prefilling, key=lambda r: r.arrival))
        return StepPlan(decode, chunks)

    def prefilled(self, request: Request) -> None:
        """The request's prompt is computed; it decodes from now on."""
        self.prefilling.remove(request)
        self.running.append(request)

    def remove(self, requests: set[Request]) -> None:
        """Forget ended requests; what they hold in the cache is not touched."""
        self.waiting.remove(requests)
        self.prefilling = [r for r in self.prefilling if r not in requests]
        self.running = [r for r in self.running if r not in requests]

    def release(self, request: Request) -> None:
        """Give back what the request holds; its computed tokens stay cached."""
        if request.sequence is not None:
            tokens = request.tokens[: request.sequence.computed]
            self._cache.release(request.namespace, request.sequence, tokens)
            request.sequence = None

    def _plan_decode(self) -> list[Request]:
        while self.running:
            sequences = [r.sequence for r in self.running if r.sequence is not None]
            if self._cache.reserve(sequences):
                break
            self._retract(max(self.running, key=lambda r: r.arrival))
        return list(self.running)

    def _plan_refresh(self, chunks: list[PlannedChunk]) -> None:
        """Turn the next step of requests whose view is outdated into a short prefill.

        The latest tokens are computed again as a last chunk, whose queries select a new view.
        """
        for request in [r for r in self.running if r.needs_refresh]:
            assert request.sequence is not None and request.sparsity is not None
            owned = request.sequence.computed - request.sequence.handle.num_tokens
            count = min(request.sparsity.settings.probes, owned + 1)
            if not request.sequence.view.headroom or not self._cache.available_tokens:
                continue
            slots = self._cache.recompute_tail(request.sequence, count)
            end = request.num_tokens
            chunks.append(PlannedChunk(request, end - count, end, slots))
            self.running.remove(request)
            self.prefilling.append(request)

    def _plan_chunk(self, request: Request, budget: int, chunks: list[PlannedChunk]) -> int:
        """Plan the next tokens of an admitted request; returns how many."""
        assert request.sequence is not None
        begin = request.sequence.computed
        count = min(request.missing, budget, self._cache.available_tokens)
        if request.chunk_quantum is not None:
            quantum = min(request.chunk_quantum, self._args.chunked_prefill_size)
            whole = min(request.missing, quantum - begin % quantum)
            count = whole if whole <= count else 0
        if count <= 0:
            return 0
        slots = self._cache.extend(request.sequence, count)
        chunks.append(PlannedChunk(request, begin, begin + count, slots))
        return count

    def _admit(self, budget: int, chunks: list[PlannedChunk]) -> None:
        room = self._args.max_running_requests - len(self.running) - len(self.prefilling)
        if not len(self.waiting) or room <= 0 or budget <= 0:
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
            budget -= self._plan_chunk(request, budget, chunks)
        if admitted:
            newest = max(r.arrival for r in admitted)
            for request in ranked:
                if request not in admitted and request.arrival < newest:
                    request.skipped += 1
            self.waiting.remove(admitted)

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
        self.release(request)
        if request in self.running:
            self.running.remove(request)
        else:
            self.prefilling.remove(request)
        if not request.num_output:
            request.prompt_logprobs = []
        request.num_retractions += 1
        self.num_retractions += 1
        self.waiting.add(request)
