"""Requests that a server makes up and answers itself before it is ready."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import numpy as np

from tca_runtime.config import RuntimeConfig
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.grammar import GrammarCompiler
from tca_runtime.messages import GenerateRequest, TokenBatch, ToScheduler, ToTokenizer
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from tca_runtime.channels import Receiver, Sender

logger = logging.getLogger(__name__)

# Tokens of a prompt that follows a known one, and of one from which nothing is selected.
SHORT = 70
# Generated: beyond the first refresh.
OUTPUT = 4


class _Script:
    """An inbox and an outbox: what is asked, and how much of it is still unanswered."""

    def __init__(self) -> None:
        self._messages: deque[ToScheduler] = deque()
        self._asked = 0
        self.open = 0

    def ask(self, prompt: list[int], sampling: SamplingParams) -> None:
        self._asked += 1
        self.open += 1
        ids = np.asarray(prompt, dtype="<i4").tobytes()
        rid = f"rehearsal-{self._asked}"
        self._messages.append(GenerateRequest(rid=rid, input_ids=ids, sampling=sampling))

    def drain(self, timeout_ms: int = 0) -> Iterator[ToScheduler]:
        while self._messages:
            yield self._messages.popleft()

    def send(self, message: ToTokenizer) -> None:
        if isinstance(message, TokenBatch):
            self.open -= sum(output.finish is not None for output in message.outputs)


def rehearse(config: RuntimeConfig, engine: Engine, context_length: int) -> int:
    """Compile the kernels that requests take, so that no client waits for that.

    A long prompt goes through chunks, selections, a tail and a refresh; then two that begin with it
    and a short one, at once. Nothing of them stays in the cache.

    Returns
    -------
    The length of the long prompt: as much as its chunks need, less where memory is small; 0 if
    there is too little for any.
    """
    settings, device = engine.sparsity, engine.device.type
    refresh = settings.first_refresh if settings is not None else 0
    wanted = config.scheduler.chunk_on(device) + (settings.granularity if settings else 0) + SHORT
    room = min(engine.cache.capacity_tokens // 3, context_length) - 2 * SHORT - refresh - OUTPUT
    length = min(wanted, room)
    if length < SHORT:
        return 0
    begin = time.perf_counter()
    script = _Script()
    scheduler = Scheduler(
        config,
        engine,
        # No request asks for a grammar.
        cast("GrammarCompiler", None),
        cast("Receiver[ToScheduler]", script),
        cast("Sender[ToTokenizer]", script),
        context_length,
    )
    count = refresh + OUTPUT
    greedy = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(max_new_tokens=count, temperature=0.8, top_p=0.9, ignore_eos=True)
    dice = np.random.default_rng(0)
    vocab = engine.model_config.vocab_size
    long, other, more = (dice.integers(0, vocab, n).tolist() for n in (length, SHORT, SHORT))
    for prompts in ([long], [long + more, long + other, other]):
        for i, prompt in enumerate(prompts):
            script.ask(prompt, drawn if i else greedy)
        while script.open:
            scheduler.run_once()
    # What a step in flight still draws for requests that have ended.
    while not scheduler.planner.is_idle:
        scheduler.run_once()
    engine.cache.reset()
    seconds = time.perf_counter() - begin
    logger.info("rehearsed with a prompt of %d tokens in %.1f s", length, seconds)
    return length
