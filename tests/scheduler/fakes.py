"""A scheduler without a model or sockets: tokens are a function of what the cache really holds."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tca_runtime.cache.manager import CacheManager
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.cache.views import ViewTable
from tca_runtime.config import RuntimeConfig, SchedulerArgs
from tca_runtime.engine.step import PositionLogprobs, StepInput, StepOutput
from tca_runtime.messages import (
    FinishReason,
    GenerateRequest,
    LogprobOptions,
    TokenBatch,
    TokenOutput,
)
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.scheduler import Scheduler

LAYERS, HEADS = 2, 1
ROWS = LAYERS * HEADS
VOCAB = 97
EOS = 0


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: any change anywhere in the context changes the outcome."""
    return zlib.crc32(np.asarray(tokens, dtype=np.int32).tobytes()) % VOCAB


def expected_output(prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """What a request alone on an endless cache generates."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class FakeEngine:
    """Stores each token's id as its key and predicts from the ids its view reads back."""

    def __init__(
        self, capacity_tokens: int, max_requests: int, share_prefixes: bool = True
    ) -> None:
        cpu = torch.device("cpu")
        pool = SlotPool(capacity_tokens * ROWS + 1, 1, torch.float32, cpu)
        arena = 4 * (capacity_tokens + 600) * ROWS
        views = ViewTable(max_requests, LAYERS, HEADS, arena, cpu)
        self.cache = CacheManager(pool, views, share_prefixes)
        self.model_config = SimpleNamespace(eos_token_ids=(EOS,))
        self.sparsity = None
        self.steps: list[StepInput] = []

    def run(self, step: StepInput) -> StepOutput:
        self.steps.append(step)
        views, kv = self.cache.views, self.cache.pool.kv
        for chunk in step.chunks:
            ids = torch.from_numpy(chunk.tokens.astype(np.float32))
            kv[chunk.slots.long(), 0, 0] = ids
        if step.decode:
            indices = torch.tensor([d.sequence.view.index for d in step.decode])
            self.cache.step([d.sequence for d in step.decode], indices)
            slots = views.last_slots(views.lists(indices))
            kv[slots.long(), 0, 0] = torch.tensor([[[float(d.token)]] for d in step.decode])
        return StepOutput(
            decode_tokens=[next_token(self.read(d.sequence.view.index)) for d in step.decode],
            chunk_tokens=[
                next_token(self.read(c.sequence.view.index)) if c.sampling else None
                for c in step.chunks
            ],
            decode_logprobs=[None] * len(step.decode),
            chunk_logprobs=[None] * len(step.chunks),
            prompt_logprobs=[
                [PositionLogprobs((0.0, int(t))) for t in self.targets(c)] for c in step.chunks
            ],
            decode_views=[None] * len(step.chunks),
        )

    @staticmethod
    def targets(chunk: Any) -> list[int]:
        return [] if chunk.prompt_targets is None else chunk.prompt_targets.tolist()

    def read(self, index: int) -> list[int]:
        """The ids a view lists; every row must list the same."""
        lists = self.cache.views.lists(torch.tensor([index]))
        rows = []
        for layer in range(LAYERS):
            begin, length = int(lists.start[0, layer, 0]), int(lists.length[0, layer, 0])
            slots = lists.arena[begin : begin + length].long()
            rows.append(self.cache.pool.kv[slots, 0, 0].int().tolist())
        assert rows[0] == rows[1]
        return rows[0]


@dataclass
class Mailbox:
    """Both ends of the scheduler's channels, in memory."""

    inbound: list[Any] = field(default_factory=list)
    outbound: list[Any] = field(default_factory=list)

    def drain(self, timeout_ms: int = 0) -> Iterator[Any]:
        while self.inbound:
            yield self.inbound.pop(0)

    def send(self, message: Any) -> None:
        self.outbound.append(message)


class NoGrammars:
    def submit(self, grammar: object) -> Future[Any]:
        raise AssertionError("no test here uses a grammar")


class Harness:
    """A scheduler and everything its clients received."""

    def __init__(self, capacity_tokens: int = 100, context: int = 1000, **args: Any) -> None:
        settings = SchedulerArgs(**{"max_running_requests": 4, **args})
        self.engine = FakeEngine(capacity_tokens, settings.max_running_requests)
        self.mail = Mailbox()
        config = RuntimeConfig(scheduler=settings)
        engine: Any = self.engine
        box: Any = self.mail
        grammars: Any = NoGrammars()
        self.scheduler = Scheduler(config, engine, grammars, box, box, context)
        self.scheduler.stream_interval = 0.0

    def submit(
        self,
        rid: str,
        prompt: Sequence[int],
        max_new_tokens: int = 5,
        logprobs: LogprobOptions | None = None,
        **fields: Any,
    ) -> None:
        self.mail.inbound.append(
            GenerateRequest(
                rid=rid,
                input_ids=np.asarray(prompt, dtype="<i4").tobytes(),
                sampling=SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0),
                logprobs=logprobs,
                **fields,
            )
        )

    def run(self, steps: int = 400) -> None:
        """Iterate until idle; fails when the scheduler does not get there."""
        for _ in range(steps):
            self.scheduler.run_once()
            if self.scheduler.planner.is_idle and not self.mail.inbound:
                self.engine.cache.check()
                return
        raise AssertionError("the scheduler did not finish")

    def outputs(self, rid: str) -> list[TokenOutput]:
        batches = [m for m in self.mail.outbound if isinstance(m, TokenBatch)]
        return [o for batch in batches for o in batch.outputs if o.rid == rid]

    def tokens(self, rid: str) -> list[int]:
        return [t for output in self.outputs(rid) for t in output.token_ids]

    def finish(self, rid: str) -> FinishReason:
        """The terminal reason; there must be exactly one."""
        ends = [o.finish for o in self.outputs(rid) if o.finish is not None]
        assert len(ends) == 1, f"{rid} has {len(ends)} terminal replies"
        return ends[0]
