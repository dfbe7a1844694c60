"""A scheduler without a model or sockets: tokens are a function of what the cache really holds."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tca_runtime.cache.manager import CacheManager
from tca_runtime.cache.slot_pool import Event, SlotPool
from tca_runtime.cache.views import ViewTable
from tca_runtime.config import RuntimeConfig, SchedulerArgs
from tca_runtime.engine.step import PositionLogprobs, StepInput, StepOutput
from tca_runtime.messages import (
    FinishReason,
    GenerateRequest,
    TokenBatch,
    TokenOutput,
)
from tca_runtime.sampling_params import Grammar, SamplingParams
from tca_runtime.scheduler.scheduler import Scheduler
from tca_runtime.sparsity.chooser import DecodeView
from tca_runtime.sparsity.settings import SparsitySettings

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


class CountingMatcher:
    """A grammar of ``length`` tokens that has to see each before it lets the next be drawn."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._accepted: list[int] = []
        self._begin: int | None = None

    @property
    def is_terminated(self) -> bool:
        return len(self._accepted) >= self._length

    def fill(self, context: list[int]) -> None:
        if self._begin is None:
            self._begin = len(context)
        assert self.is_terminated or context[self._begin :] == self._accepted

    def accept(self, token: int) -> None:
        self._accepted.append(token)


class FakeGrammars:
    """Compiles at once; the pattern is a grammar's length.

    ``given`` is what to hand out instead, ``held`` what was submitted and not released.
    """

    def __init__(self) -> None:
        self.given: Future[Any] | None = None
        self.held: list[Future[Any]] = []

    def submit(self, grammar: Grammar) -> Future[Any]:
        future: Future[Any] = Future() if self.given is None else self.given
        if self.given is None:
            compiled = SimpleNamespace(matcher=lambda: CountingMatcher(int(grammar.value)))
            future.set_result(compiled)
        self.held.append(future)
        return future

    def release(self, grammar: Grammar, future: Future[Any]) -> None:
        self.held.remove(future)


class FakeStep:
    """A launched step: its tokens are drawn already but not shown before ``result``."""

    def __init__(
        self, engine: FakeEngine, step: StepInput, written: list[tuple[Tensor, Tensor]]
    ) -> None:
        num_requests = len(step.decode) + len(step.chunks)
        self.decode_views: list[DecodeView | None] = [None] * num_requests
        self._engine = engine
        self._step = step
        self._written = written
        self._drawn: list[int] | None = None
        sampling = [*step.decode, *(c for c in step.chunks if c.sampling)]
        self._rows = [s.sequence.view.index for s in sampling]
        self._constrained = [s for s in sampling if s.sampling and s.sampling.matcher]
        self._contexts = [engine.read(row) for row in self._rows]
        if not self._constrained:
            self.sample()

    def sample(self) -> None:
        if self._drawn is not None:
            return
        for entry in self._constrained:
            matcher: Any = entry.sampling.matcher if entry.sampling else None
            matcher.fill(self._contexts[self._rows.index(entry.sequence.view.index)])
        self._drawn = [next_token(context) for context in self._contexts]
        self._engine.tokens[self._rows] = torch.tensor(self._drawn, dtype=torch.int64)

    def result(self) -> StepOutput:
        self.sample()
        assert self._drawn is not None
        assert self._engine.in_flight.popleft() is self, "steps end in the order of their launch"
        self.check_slots()
        step, num_decode = self._step, len(self._step.decode)
        ends = iter(self._drawn[num_decode:])
        return StepOutput(
            decode_tokens=self._drawn[:num_decode],
            chunk_tokens=[next(ends) if c.sampling else None for c in step.chunks],
            decode_logprobs=[None] * num_decode,
            chunk_logprobs=[None] * len(step.chunks),
            prompt_logprobs=[
                [PositionLogprobs((0.0, int(t))) for t in self.targets(c)] for c in step.chunks
            ],
            dropped_mass=[None] * len(self.decode_views),
        )

    def check_slots(self) -> None:
        """Until a step has ended, what it wrote still belongs to its requests, and is intact."""
        free = set(self._engine.cache.pool.free_slots().tolist())
        kv = self._engine.cache.pool.kv
        for slots, ids in self._written:
            assert not free.intersection(slots.flatten().tolist()), "freed under a running step"
            assert torch.equal(kv[slots.long(), 0, 0], ids.expand(slots.shape)), "overwritten"

    @staticmethod
    def targets(chunk: Any) -> list[int]:
        return [] if chunk.prompt_targets is None else chunk.prompt_targets.tolist()


class FakeBegun:
    """A step whose layers come one by one; until it ends, its slots are its own."""

    def __init__(self, engine: FakeEngine, step: StepInput) -> None:
        self.parts_left = LAYERS
        self._engine = engine
        self._step = step

    def advance(self, num_parts: int) -> None:
        free = set(self._engine.cache.pool.free_slots().tolist())
        for chunk in self._step.chunks:
            assert not free.intersection(chunk.slots.flatten().tolist()), "freed between layers"
        self.parts_left -= min(num_parts, self.parts_left)

    def finish(self) -> FakeStep:
        assert not self.parts_left
        return self._engine.launch(self._step)


class FakeEngine:
    """Stores each token's id as its key and predicts from the ids its view reads back.

    ``is_asynchronous`` makes it one whose tokens come later: the order of what happens to memory
    is that of a device with one stream. Freed slots are overwritten at once. ``sparsity`` tells the
    scheduler of a selection; nothing is selected.
    """

    def __init__(
        self,
        capacity_tokens: int,
        max_requests: int,
        share_prefixes: bool = True,
        is_asynchronous: bool = False,
        sparsity: SparsitySettings | None = None,
    ) -> None:
        cpu = torch.device("cpu")
        pool = SlotPool(capacity_tokens * ROWS + 1, 1, torch.float32, cpu)
        arena = 4 * (capacity_tokens + 600) * ROWS
        views = ViewTable(max_requests, LAYERS, HEADS, arena, cpu)
        self.cache = CacheManager(pool, views, share_prefixes)
        self.model_config = SimpleNamespace(eos_token_ids=(EOS,))
        self.shape = SimpleNamespace(num_layers=LAYERS)
        self.begun = 0
        self.sparsity = sparsity
        self.is_asynchronous = is_asynchronous
        self.tokens = torch.zeros(max_requests + 1, dtype=torch.int64)
        self.steps: list[StepInput] = []
        self.in_flight: deque[FakeStep] = deque()
        self.deepest = 0
        free = pool.free

        def poison_and_free(slots: Tensor, after: Event | None = None) -> None:
            pool.kv[slots.reshape(-1).long()] = -1.0
            free(slots, after)

        pool.free = poison_and_free  # type: ignore[method-assign]

    def begin(self, step: StepInput) -> FakeBegun:
        self.begun += 1
        return FakeBegun(self, step)

    def launch(self, step: StepInput) -> FakeStep:
        self.steps.append(step)
        views, kv = self.cache.views, self.cache.pool.kv
        written: list[tuple[Tensor, Tensor]] = []
        for chunk in step.chunks:
            written.append((chunk.slots, torch.from_numpy(chunk.tokens.astype(np.float32))))
        if step.decode:
            indices = torch.tensor([d.sequence.view.index for d in step.decode])
            self.cache.step([d.sequence for d in step.decode], indices)
            slots = views.last_slots(views.lists(indices))
            written.append((slots, self.tokens[indices].float()[:, None, None]))
        for target, ids in written:
            kv[target.long(), 0, 0] = ids.expand(target.shape)
        launched = FakeStep(self, step, written)
        self.in_flight.append(launched)
        self.deepest = max(self.deepest, len(self.in_flight))
        return launched

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


class InMemoryScheduler:
    """A scheduler without sockets, and everything its clients received."""

    def __init__(self, config: RuntimeConfig, engine: Any, grammars: Any, context: int) -> None:
        self.engine = engine
        self.mail = Mailbox()
        mail: Any = self.mail
        self.scheduler = Scheduler(config, engine, grammars, mail, mail, context)

    def send(
        self, rid: str, prompt: Sequence[int], sampling: SamplingParams, **fields: Any
    ) -> None:
        packed = np.asarray(prompt, dtype="<i4").tobytes()
        self.mail.inbound.append(
            GenerateRequest(rid=rid, input_ids=packed, sampling=sampling, **fields)
        )

    def run(self, steps: int = 5000) -> None:
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

    def last(self, rid: str) -> TokenOutput:
        return self.outputs(rid)[-1]

    def tokens(self, rid: str) -> list[int]:
        return [t for output in self.outputs(rid) for t in output.token_ids]

    def finish(self, rid: str) -> FinishReason:
        """The terminal reason; there must be exactly one."""
        ends = [o.finish for o in self.outputs(rid) if o.finish is not None]
        assert len(ends) == 1, f"{rid} has {len(ends)} terminal replies"
        return ends[0]


class Harness(InMemoryScheduler):
    """A scheduler over the fake engine."""

    engine: FakeEngine

    def __init__(
        self,
        capacity_tokens: int = 100,
        context: int = 1000,
        is_asynchronous: bool = False,
        sparsity: SparsitySettings | None = None,
        **args: Any,
    ) -> None:
        settings = SchedulerArgs(**{"max_running_requests": 4, **args})
        engine = FakeEngine(
            capacity_tokens,
            settings.max_running_requests,
            is_asynchronous=is_asynchronous,
            sparsity=sparsity,
        )
        self.grammars = FakeGrammars()
        super().__init__(RuntimeConfig(scheduler=settings), engine, self.grammars, context)
        self.scheduler.stream_interval = 0.0

    def submit(
        self,
        rid: str,
        prompt: Sequence[int],
        max_new_tokens: int = 5,
        grammar: int | None = None,
        **fields: Any,
    ) -> None:
        sampling = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            grammar=None if grammar is None else Grammar("regex", str(grammar)),
        )
        self.send(rid, prompt, sampling, **fields)

    def run(self, steps: int = 400) -> None:
        super().run(steps)
