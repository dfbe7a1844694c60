"""Prefill of the engine at the 8B shape: sections of ``bench_engine.py``."""

from __future__ import annotations

import gc
import statistics
from collections import defaultdict
from dataclasses import replace
from typing import Any

from bench_run import BenchRun
from engine_driver import (
    CHUNK,
    budgets,
    prefill,
    random_tokens,
    release,
    served_seconds,
    settings,
)
from prefill_profile import kernel_shares

from tca_runtime.attention.flashinfer_backend import FlashInferBackend, FlashInferPrefill
from tca_runtime.engine.engine import Engine
from tca_runtime.sparsity.settings import SparsitySettings


def weight_bytes(engine: Engine) -> float:
    c = engine.model_config
    qkv = c.hidden_size * (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
    out = c.num_q_heads * c.head_dim * c.hidden_size
    layer = qkv + out + 3 * c.hidden_size * c.intermediate_size
    return 2.0 * (c.num_layers * layer + c.vocab_size * c.hidden_size)


def linear_flops(engine: Engine, tokens: int) -> float:
    c = engine.model_config
    return tokens * (weight_bytes(engine) - 2.0 * c.vocab_size * c.hidden_size)


def views_of(engine: Engine, mode: str) -> SparsitySettings | None:
    """What a mode says before the slash, see ``timed_prefill``; None for full attention."""
    if mode.startswith("fa"):
        return None
    kept, _, probes = mode.partition("/")[0].partition("@")
    chosen = settings(budgets(engine, int(kept) / 100, True), budgets(engine, 0.39, True))
    return replace(chosen, prefill_probes=int(probes)) if probes else chosen


def timed_prefill(run: BenchRun, engine: Engine, context: int, mode: str) -> float:
    """One cold prompt.

    ``mode``: fa2, fa3, or the kept percentage of prefill views, behind an @ the queries that choose
    them; behind a slash the tokens of a chunk, where they are not 8192. The server's chunks have
    one selection each.
    """
    wanted, chunk = views_of(engine, mode), mode.partition("/")[2]
    backend = engine.backend
    assert isinstance(backend, FlashInferBackend)
    usual = backend._prefill
    if mode == "fa2":
        backend._prefill = FlashInferPrefill(engine.shape, "fa2")
    tokens = random_tokens(engine, context, context)
    done = prefill(engine, tokens, wanted, int(chunk or CHUNK))
    release(engine, done)
    engine.cache.flush()
    if mode == "fa2":
        backend._prefill = usual
        # Its wrappers refer to themselves: half a GiB that the longest contexts need.
        gc.collect()
    c = engine.model_config
    attention = 2.0 * context**2 * c.num_q_heads * c.head_dim * c.num_layers
    floor = (linear_flops(engine, context) + (attention if wanted is None else 0)) / run.matmul
    run.record(
        "prefill", context=context, mode=mode, seconds=done.seconds, floor_without_views_s=floor
    )
    return done.seconds


def prefills(run: BenchRun, engine: Engine) -> None:
    usual, few = ("fa3", "fa2", "10", "15", "39"), ("fa3", "10")
    # Larger chunks give dense prefill larger products too.
    chunks = ("10/4096", "39/4096", "10/16384", "39/16384", "fa3/16384")
    plan = {32768: usual, 65536: usual, 131072: (*usual, *chunks), 262144: few}
    # The targets' context: in turn, because the card's clock follows its temperature.
    again = ("fa3", "10", "39", "10@16", "39@16")
    plan[131072] += 2 * again
    if run.tiny:
        plan = {2048: few}
    warm = 1024 if run.tiny else 20480
    for mode in ("fa3", "fa2", "10") if not run.tiny else ("10",):
        prefill_only_warm(engine, warm, mode)
    for context, modes in plan.items():
        times = defaultdict(list)
        for mode in modes:
            times[mode].append(timed_prefill(run, engine, context, mode))
        seconds = {mode: statistics.median(values) for mode, values in times.items()}
        ratios = {f"x{mode}": seconds["fa3"] / s for mode, s in seconds.items()}
        run.record("prefill_ratio", context=context, **ratios)


def served(run: BenchRun, engine: Engine) -> None:
    """The same through the scheduler: its chunks, the tail that sees everything, the reply."""
    for context in (2048,) if run.tiny else (32768, 131072):
        tokens = random_tokens(engine, context, 11)
        seconds = {}
        for mode in ("fa3", "10", "39"):
            engine.use_sparsity(views_of(engine, mode))
            # Compiles what the sections before did not need.
            served_seconds(engine, tokens[: context // 4])
            seconds[mode] = served_seconds(engine, tokens)
            run.record("served", context=context, mode=mode, seconds=seconds[mode])
        ratios = {f"x{mode}": seconds["fa3"] / s for mode, s in seconds.items()}
        run.record("served_ratio", context=context, **ratios)


def prefill_only_warm(engine: Engine, context: int, mode: str) -> None:
    """Compile and load kernels outside of what is timed."""
    quiet = BenchRun(engine.device, engine.shape.dtype, 0.0, True, 1.0, 1.0)
    timed_prefill(quiet, engine, context, mode)


def breakdown(run: BenchRun, engine: Engine) -> None:
    prefill_only_warm(engine, 1024 if run.tiny else 20480, "10")
    cases = [(65536, 0.1), (65536, 0.39), (131072, 0.1), (131072, 0.39), (262144, 0.1)]
    for context, ratio in [(2048, 0.1)] if run.tiny else cases:
        wanted = settings(budgets(engine, ratio, True), budgets(engine, 0.39, True))
        tokens = random_tokens(engine, context, 5)

        def work(tokens: Any = tokens, wanted: Any = wanted) -> None:
            release(engine, prefill(engine, tokens, wanted))

        run.record("breakdown", context=context, kept=ratio, **kernel_shares(work))
        engine.cache.flush()


def long_prefill(run: BenchRun, engine: Engine) -> None:
    """Beyond the contexts of ``prefill``; takes minutes."""
    if run.tiny:
        return
    for mode in ("10", "fa3"):
        prefill_only_warm(engine, 20480, mode)
    sparse, dense = (timed_prefill(run, engine, 524288, mode) for mode in ("10", "fa3"))
    run.record("prefill_ratio", context=524288, x10=dense / sparse)
