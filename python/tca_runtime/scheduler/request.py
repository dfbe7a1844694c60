"""One request as the scheduler sees it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tca_runtime.cache.radix_tree import Namespace, Tokens
from tca_runtime.cache.sequence import Sequence
from tca_runtime.engine.grammar import CompiledGrammar
from tca_runtime.engine.sampler import RowSampling
from tca_runtime.engine.step import LogprobWish, PositionLogprobs
from tca_runtime.messages import FinishReason, GenerateRequest
from tca_runtime.sparsity.chooser import RequestSparsity


@dataclass(eq=False)
class ClientAccount:
    """What a client has been served, and how many of its requests wait; see ``FairShares``."""

    served: float
    waiting: int = 0


@dataclass(eq=False)
class Request:
    """A prompt, its output so far, and its hold on the cache.

    ``tokens[: num_tokens]`` is prompt + output. K and V of the newest sampled token are not
    computed before the next step, so a running request has ``sequence.computed == num_tokens - 1``
    plus ``num_pending``.

    Attributes
    ----------
    arrival : order of arrival; a retracted request keeps it
    max_new_tokens : what the client asked for, limited by context and cache
    num_pending : tokens that launched steps draw and the host has not seen yet
    finish : set once the request must end; one place in the scheduler acts on it
    sequence : hold on the cache, None while waiting
    skipped : admissions that passed this request by
    account, paid_output : who pays for the request, and the output tokens already paid for
    arrived_at, admitted_at : by ``time.monotonic``; the latter of the first admission
    grammar : set while the request's grammar compiles; it is not admitted before
    selected_at : tokens at the last selection of the decode view, None before the first
    unsure : whether the next token has to be drawn again, with more in view; what is on its way
        counts no more
    raised_at : output tokens when that happened
    tca : what selection did, for the client
    """

    message: GenerateRequest
    arrival: int
    max_new_tokens: int
    sampling: RowSampling
    tokens: Tokens
    num_prompt: int
    num_tokens: int
    num_pending: int = 0
    namespace: Namespace = Namespace()
    sparsity: RequestSparsity | None = None
    finish: FinishReason | None = None
    sequence: Sequence | None = None
    cached_tokens: int | None = None
    num_retractions: int = 0
    skipped: int = 0
    account: ClientAccount | None = None
    paid_output: int = 0
    arrived_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    num_sent: int = 0
    sent_at: float = 0.0
    selected_at: int | None = None
    unsure: bool = False
    raised_at: int | None = None
    tca: dict[str, Any] | None = None
    grammar: Future[CompiledGrammar] | None = None
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    output_logprobs: list[PositionLogprobs] = field(default_factory=list)

    @property
    def rid(self) -> str:
        return self.message.rid

    @property
    def client(self) -> str:
        """Whose share of the server this request takes."""
        return self.message.client

    @property
    def queue_seconds(self) -> float:
        """How long the request waited for its first admission, so far."""
        until = time.monotonic() if self.admitted_at is None else self.admitted_at
        return until - self.arrived_at

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def all_tokens(self) -> Tokens:
        return self.tokens[: self.num_tokens]

    @property
    def held(self) -> Sequence:
        """The place in the cache of a request that has one."""
        assert self.sequence is not None
        return self.sequence

    @property
    def missing(self) -> int:
        """Tokens whose K and V must be computed before the next one can be sampled."""
        return self.num_tokens - (self.sequence.computed if self.sequence else 0)

    @property
    def logprob_start(self) -> int:
        """First prompt position whose logprob is wanted; the prompt's length when none is."""
        wish = self.message.logprobs
        return self.num_prompt if wish is None else min(wish.start, self.num_prompt)

    @property
    def wish(self) -> LogprobWish | None:
        wish = self.message.logprobs
        if wish is not None:
            return LogprobWish(wish.top_k, wish.token_ids)
        return LogprobWish() if self.min_confidence is not None else None

    @property
    def min_confidence(self) -> float | None:
        """The probability with which tokens must be drawn from the decode view there is."""
        if self.sparsity is None or self.selected_at is None:
            return None
        return self.sparsity.min_confidence

    @property
    def reusable_tokens(self) -> int:
        """How much of a cached prefix this request may skip.

        The token before each position whose logits are wanted has to be computed. So have the
        last tokens of a prompt whose decode view will be selected: their queries choose it.
        """
        if not self.num_output and self.logprob_start < self.num_prompt:
            return max(self.logprob_start - 1, 0)
        if not self.max_new_tokens:
            return self.num_tokens
        probes = 1
        if self.sparsity is not None and self.sparsity.settings.num_candidates(self.num_tokens):
            probes = self.sparsity.settings.probes
        return max(self.num_tokens - probes, 0)

    @property
    def can_decode(self) -> bool:
        """Whether the next step may draw a token for this running request: none is on its way
        that is its last, and none has to be drawn again."""
        return not self.unsure and self.num_output + self.num_pending < self.max_new_tokens

    @property
    def refresh(self) -> RequestSparsity | None:
        """By what the next decode step selects a new view; None to keep the one there is."""
        ends = self.num_output + self.num_pending + 1 >= self.max_new_tokens
        return self.sparsity if self.is_outdated(1) and not ends else None

    def is_outdated(self, more: int = 0) -> bool:
        """Whether so many tokens are computed, with ``more``, that the decode view is to be
        selected anew."""
        if self.sparsity is None or self.selected_at is None or self.sequence is None:
            return False
        before = self.selected_at - self.num_prompt
        since = self.sequence.computed + more - self.selected_at
        return since >= self.sparsity.settings.refresh_after(before)

    def is_due(self, now: float, interval: float) -> bool:
        """Whether the client should be told of its new tokens now; the first never wait."""
        if self.num_sent == 0:
            return True
        return self.message.incremental and now - self.sent_at >= interval

    @property
    def cacheable(self) -> Tokens:
        """Computed tokens, without the last one drawn.

        A step launched before the request was known to end may have computed that too. Leaving it
        out makes the cache independent of such luck.
        """
        assert self.sequence is not None
        known = self.num_tokens - 1 if self.num_output else self.num_tokens
        return self.tokens[: min(self.sequence.computed, known)]

    def append(self, token: int) -> None:
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1

    def back_to_waiting(self) -> None:
        """Forget what only holds for a place in the cache that is given up.

        The next place in the view table has no queries of this request's tokens that a refresh
        could use.
        """
        self.selected_at = None
        if self.unsure:
            assert self.sparsity is not None
            self.unsure, self.raised_at = False, self.num_output
            self.sparsity = self.sparsity.raised()
            self.sampling.num_drawn = self.num_output


def token_buffer(prompt: Tokens, max_new_tokens: int) -> Tokens:
    """The prompt with room for the output behind it."""
    tokens = np.empty(len(prompt) + max_new_tokens, dtype=np.int32)
    tokens[: len(prompt)] = prompt
    return tokens
