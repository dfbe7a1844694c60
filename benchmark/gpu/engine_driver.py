"""An engine of a real model's shape, driven without scheduler, HTTP or tokens that matter."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.radix_tree import Namespace, Tokens
from tca_runtime.cache.sequence import Sequence
from tca_runtime.config import (
    CacheArgs,
    ModelArgs,
    RuntimeConfig,
    SchedulerArgs,
    SparsityArgs,
)
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.sampler import RowSampling
from tca_runtime.engine.step import ChunkInput, DecodeInput, StepInput
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.in_memory import in_memory_scheduler
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.chooser import DecodeView, RequestSparsity
from tca_runtime.sparsity.policies import create_policy
from tca_runtime.sparsity.settings import SparsitySettings

SAMPLING = RowSampling(SamplingParams(temperature=0.0), 0, np.zeros(1, dtype=np.int32))
NAMESPACE = Namespace()
CHUNK = 8192
"""Tokens of a prompt per step."""


WINDOW = 128
"""Latest tokens that are never dropped: what comes with the runtime was calibrated for so many."""


def make_engine(model: str, tokens: int | None, host_gib: float, device: str) -> Engine:
    """An engine with random weights; selection is decided per call, not by the server."""
    named = model != "tiny"
    config = RuntimeConfig(
        model=ModelArgs(
            load_format="dummy",
            model_config=model,
            device=device,
            context_length=(1 << 20) + 4096 if named else None,
        ),
        cache=CacheArgs(max_total_tokens=tokens, mem_fraction=0.9),
        scheduler=SchedulerArgs(max_running_requests=24),
        sparsity=SparsityArgs(tca_config="uniform:0.39", host_cache_size=host_gib),
    )
    engine = Engine(config)
    engine.use_sparsity(settings(*[budgets(engine, 0.39, True)] * 2))
    return engine


def budgets(engine: Engine, ratio: float, ragged: bool, seed: int = 0) -> BudgetTable:
    """Budgets of an average kept ratio; ragged ones differ by head as a calibration's do."""
    layers, heads = engine.shape.num_layers, engine.shape.num_kv_heads
    table = BudgetTable.uniform(ratio, layers, heads)
    if not ragged:
        return table
    spread = np.random.default_rng(seed).normal(0.0, 1.0, (layers, heads))
    return replace(table, mu=table.mu + spread).at_ratio(ratio)


def settings(prefill: BudgetTable, decode: BudgetTable) -> SparsitySettings:
    return SparsitySettings(create_policy("tca"), prefill, decode, window=WINDOW)


@dataclass
class Prefilled:
    """A prompt in the cache, and how long its last tokens took to compute."""

    sequence: Sequence
    tokens: Tokens
    seconds: float
    view: DecodeView | None


def prefill(
    engine: Engine, tokens: Tokens, wanted: SparsitySettings | None, chunk: int = CHUNK
) -> Prefilled:
    """What the scheduler does with a prompt, from its match in the tree to its first token.

    A chunk is launched while the device computes the one before.
    """
    cache = engine.cache
    torch.cuda.synchronize()
    begin = time.perf_counter()
    match = cache.match(NAMESPACE, tokens[:-1])
    sequence = cache.begin(match, len(tokens) - match.num_tokens + 256)
    assert sequence is not None
    request = RequestSparsity(wanted) if wanted is not None else None
    view, in_flight = None, None
    while sequence.computed < len(tokens):
        first = sequence.computed
        last = min(first + chunk, len(tokens))
        slots = cache.extend(sequence, last - first)
        ends = last == len(tokens)
        part = ChunkInput(
            sequence,
            tokens[first:last],
            slots,
            sampling=SAMPLING if ends else None,
            sparsity=request,
            ends_prompt=ends,
        )
        step = engine.launch(StepInput([], [part]))
        view = step.decode_views[0]
        if in_flight is not None:
            in_flight.result()
        in_flight = step
    if in_flight is not None:
        in_flight.result()
    cache.commit(NAMESPACE, sequence, tokens)
    if view is not None:
        cache.show([sequence], [view.lengths], [view.slots])
    torch.cuda.synchronize()
    return Prefilled(sequence, tokens, time.perf_counter() - begin, view)


def served_seconds(engine: Engine, tokens: Tokens) -> float:
    """From a prompt's arrival at an idle scheduler to its first token; the cache is empty then."""
    engine.cache.flush()
    scheduler, inbox, outbox = in_memory_scheduler(RuntimeConfig(), engine, 1 << 20)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    inbox.submit("prompt", tokens, SamplingParams(max_new_tokens=1, temperature=0.0))
    while not outbox.outputs:
        scheduler.run_once()
    seconds = outbox.last - begin
    while not scheduler.planner.is_idle:
        scheduler.run_once()
    engine.cache.flush()
    return seconds


def release(engine: Engine, done: Prefilled) -> None:
    engine.cache.release(NAMESPACE, done.sequence, done.tokens[: done.sequence.computed])


def random_tokens(engine: Engine, count: int, seed: int) -> Tokens:
    generator = np.random.default_rng(seed)
    return generator.integers(0, engine.model_config.vocab_size, count).astype(np.int32)


class NoRoomError(Exception):
    """The device's memory is too small for what a section measures."""


def synthetic_sequences(
    engine: Engine, batch: int, context: int, table: BudgetTable | None, steps: int
) -> list[Sequence]:
    """Requests in mid-decode over random slots of the pool, without a prefill.

    Lists of different requests may share slots where the pool is smaller than all of them; each
    is still read on its own.

    Raises
    ------
    NoRoomError
        When the lists of all of them do not fit beside the pool.
    """
    rows, pool = engine.shape.rows, engine.cache.pool
    lengths = np.full(rows, context, dtype=np.int64)
    if table is not None:
        candidates = (context - WINDOW) // 64
        lengths = table.kept_tokens(candidates).reshape(-1) + context - candidates * 64
    sequences = []
    for _ in range(batch):
        total = int(lengths.sum())
        slots = torch.randint(1, pool.capacity, (total,), dtype=torch.int32, device=engine.device)
        lists = HeadSlots(0, context, lengths, slots)
        view = engine.cache.views.open([lists], steps)
        if view is None:
            for made in sequences:
                engine.cache.views.close(made.view)
            raise NoRoomError(f"the slot lists of {batch} x {context} tokens do not fit")
        spare = torch.randint(
            1, pool.capacity, (rows, steps), dtype=torch.int32, device=engine.device
        )
        engine.cache.views.prepare(view, spare)
        nothing: Any = None
        sequences.append(Sequence(nothing, view, context))
    return sequences


def decode_inputs(sequences: list[Sequence]) -> StepInput:
    return StepInput([DecodeInput(s, SAMPLING) for s in sequences], [])
