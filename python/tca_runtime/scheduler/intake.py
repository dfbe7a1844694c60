"""From a message to a request, or to a refusal."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np

from tca_runtime.cache.radix_tree import Namespace
from tca_runtime.engine.sampler import RowSampling
from tca_runtime.messages import FinishReason, GenerateRequest
from tca_runtime.scheduler.request import Request, token_buffer
from tca_runtime.scheduler.waiting import WaitingQueue
from tca_runtime.sparsity.chooser import RequestSparsity, request_sparsity
from tca_runtime.sparsity.settings import SparsitySettings


@dataclass(frozen=True)
class Limits:
    """What bounds a request: tokens of the model's context and of the whole KV cache."""

    context_length: int
    cache_tokens: int
    max_queued: int


class Intake:
    """Builds requests: seeds, lengths, namespaces and sparsity.

    Parameters
    ----------
    sparsity : the server's settings, None for full attention
    retention : when cached slots can be dropped, so that differently pruned prefixes must not mix
    share_prefixes : whether what a request gave up is found again
    """

    def __init__(
        self,
        limits: Limits,
        eos_ids: frozenset[int],
        seed: int | None,
        sparsity: SparsitySettings | None,
        retention: str,
        share_prefixes: bool,
    ) -> None:
        self._limits = limits
        self._eos_ids = eos_ids
        self._seeds = random.Random(seed)
        self._arrivals = itertools.count()
        self._sparsity = sparsity
        self._retention = retention
        self._can_reread = share_prefixes and retention != "immediate"

    def build(self, message: GenerateRequest, waiting: WaitingQueue) -> Request:
        """The request; its ``finish`` is set when it must be refused.

        In a full queue another request may have to make room for it.
        """
        prompt = np.frombuffer(message.input_ids, dtype="<i4").astype(np.int32)
        limits = self._limits
        room = min(limits.context_length, limits.cache_tokens) - len(prompt)
        params = message.sampling
        max_new = max(0, min(params.max_new_tokens, room))
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(62)
        sampling = RowSampling(params, seed, prompt, self._eos_ids)
        sparsity, refusal = self._sparsity_of(message)
        if sparsity is not None and (sampling.is_penalised or not self._can_reread):
            # What was counted cannot be drawn again; what was pruned cannot be read again.
            sparsity = sparsity.raised()
        refusal = refusal or self._refusal(message, len(prompt), room, waiting)
        return Request(
            message=message,
            arrival=next(self._arrivals),
            max_new_tokens=max_new,
            sampling=sampling,
            tokens=token_buffer(prompt, max_new),
            num_prompt=len(prompt),
            num_tokens=len(prompt),
            namespace=self._namespace(message, sparsity),
            sparsity=sparsity,
            finish=refusal,
        )

    def _sparsity_of(
        self, message: GenerateRequest
    ) -> tuple[RequestSparsity | None, FinishReason | None]:
        try:
            return request_sparsity(self._sparsity, message.sampling.custom_params), None
        except ValueError as error:
            return None, FinishReason("abort", message=str(error), status=400)

    def _namespace(self, message: GenerateRequest, sparsity: RequestSparsity | None) -> Namespace:
        key = message.extra_key or ""
        if self._retention == "never" or sparsity is None:
            return Namespace(key, prunable=False)
        name = f"{key}\0{sparsity.largest.fingerprint}"
        if self._retention == "immediate" and sparsity.max_dropped_mass is not None:
            # Its own limit says how much of what it shares with others a request drops.
            name += f"\0{sparsity.max_dropped_mass}"
        return Namespace(name, prunable=True)

    def _refusal(
        self, message: GenerateRequest, num_prompt: int, room: int, waiting: WaitingQueue
    ) -> FinishReason | None:
        limits = self._limits
        if room < (1 if message.sampling.max_new_tokens else 0):
            text = (
                f"the prompt has {num_prompt} tokens; the context holds {limits.context_length} "
                f"and the KV cache {limits.cache_tokens}, output included"
            )
            return FinishReason("abort", message=text, status=400)
        full = len(waiting) >= limits.max_queued and waiting.num_open >= limits.max_queued
        if full and not waiting.displace(message.client, message.priority):
            text = f"{limits.max_queued} requests are waiting already"
            return FinishReason("abort", message=text, status=503)
        return None
