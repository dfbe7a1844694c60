"""A scheduler that is fed and answers in its own process: no ZMQ, no tokenizer process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike

from tca_runtime.config import RuntimeConfig
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.grammar import GrammarCompiler
from tca_runtime.messages import GenerateRequest, TokenBatch, TokenOutput, ToScheduler, ToTokenizer
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from tca_runtime.channels import Receiver, Sender


class Inbox:
    """What the scheduler reads instead of a ZMQ socket; never waits."""

    def __init__(self) -> None:
        self.messages: deque[ToScheduler] = deque()

    def drain(self, timeout_ms: int = 0) -> Iterator[ToScheduler]:
        while self.messages:
            yield self.messages.popleft()

    def submit(self, rid: str, prompt: ArrayLike, sampling: SamplingParams, **fields: Any) -> None:
        """Queue a prompt's tokens as the tokenizer process would send them."""
        packed = np.asarray(prompt, dtype="<i4").tobytes()
        request = GenerateRequest(rid=rid, input_ids=packed, sampling=sampling, **fields)
        self.messages.append(request)


class Outbox:
    """Where the scheduler sends; keeps outputs and when the last one came."""

    def __init__(self) -> None:
        self.outputs: list[TokenOutput] = []
        self.last = 0.0

    def send(self, message: ToTokenizer) -> None:
        if isinstance(message, TokenBatch):
            self.last = time.perf_counter()
            self.outputs += message.outputs


def in_memory_scheduler(
    config: RuntimeConfig,
    engine: Engine,
    context_length: int,
    grammars: GrammarCompiler | None = None,
) -> tuple[Scheduler, Inbox, Outbox]:
    """A scheduler that is fed and answers in this process.

    Without ``grammars`` a request that needs one fails.
    """
    inbox, outbox = Inbox(), Outbox()
    scheduler = Scheduler(
        config,
        engine,
        cast("GrammarCompiler", grammars),
        cast("Receiver[ToScheduler]", inbox),
        cast("Sender[ToTokenizer]", outbox),
        context_length,
    )
    return scheduler, inbox, outbox
