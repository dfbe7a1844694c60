"""The engine on one GPU at the 8B shape: decode, prefill, prefix hits, sessions that fit.

    PYTHONPATH=kernels:python python benchmark/gpu/bench_engine.py

Random weights, no HTTP and no scheduler process. Dense is this engine without selection.
``--tiny`` is a dry run of every section with a tiny model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_run import BenchRun
from engine_driver import (
    NAMESPACE,
    SAMPLING,
    WINDOW,
    NoRoomError,
    budgets,
    decode_inputs,
    make_engine,
    prefill,
    random_tokens,
    release,
    settings,
    synthetic_sequences,
)
from engine_prefill import (
    breakdown,
    long_prefill,
    prefill_only_warm,
    prefills,
    served,
    weight_bytes,
)
from timing import copy_bandwidth, matmul_flops, pinned_bandwidth, sustained_matmul_flops

from tca_kernels.move import move_rows
from tca_runtime.cache.transfer import COPY_PROGRAMS
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.step import DecodeInput, StepInput
from tca_runtime.sparsity.chooser import RequestSparsity


def ceilings(run: BenchRun, engine: Engine) -> None:
    run.copy, run.matmul = copy_bandwidth(run.device), matmul_flops(run.device)
    run.record(
        "ceiling",
        copy_gbps=run.copy / 1e9,
        matmul_tflops=run.matmul / 1e12,
        sustained_tflops=sustained_matmul_flops(run.device) / 1e12,
        pinned_gbps=pinned_bandwidth(run.device),
    )
    run.record(
        "pool",
        tokens=engine.cache.capacity_tokens,
        slots=engine.cache.pool.capacity,
        backend=type(engine.backend).__name__,
    )


def decode_step(run: BenchRun, engine: Engine, batch: int, context: int, mode: str) -> float:
    """Median wall time of a whole step, sampled tokens on the host included."""
    steps = 6 if run.tiny else 24
    table = None if mode == "dense" else budgets(engine, 0.39, mode == "ragged")
    sequences = synthetic_sequences(engine, batch, context, table, steps + 8)
    wall: list[float] = []
    for _ in range(steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        engine.run(decode_inputs(sequences))
        wall.append(time.perf_counter() - begin)
    graph_ms = replay_ms(engine, sequences)
    slots = sum(int(s.view.lengths.sum()) for s in sequences)
    floor = (slots * 2 * engine.shape.head_dim * 2 + weight_bytes(engine)) / run.copy * 1e3
    for sequence in sequences:
        engine.cache.views.close(sequence.view)
    step_ms = statistics.median(wall) * 1e3
    run.record(
        "decode_step",
        batch=batch,
        context=context,
        mode=mode,
        step_ms=step_ms,
        forward_ms=graph_ms,
        floor_ms=floor,
        over_floor=step_ms / floor,
        tokens_per_s=batch / step_ms * 1e3,
    )
    return step_ms


def replay_ms(engine: Engine, sequences: list[Any]) -> float:
    """Device time of the captured forward pass."""
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        engine._replay(decode_inputs(sequences))
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def decode(run: BenchRun, engine: Engine) -> None:
    begin = time.perf_counter()
    engine.warm_up()
    run.record("capture", seconds=time.perf_counter() - begin)
    engine.cache.pool.kv.normal_()
    contexts = (512,) if run.tiny else (32768, 131072)
    for context in contexts:
        for batch in (1,) if run.tiny else (1, 8, 16):
            modes = ("dense", "uniform", "ragged")
            try:
                ms = {mode: decode_step(run, engine, batch, context, mode) for mode in modes}
            except NoRoomError as error:
                run.record("decode_skipped", batch=batch, context=context, why=str(error))
                continue
            run.record(
                "decode_ratio",
                batch=batch,
                context=context,
                uniform=ms["dense"] / ms["uniform"],
                ragged=ms["dense"] / ms["ragged"],
            )


def sessions(run: BenchRun, engine: Engine) -> None:
    """Sessions that fit in the pool, and the tokens per second of all of them decoding."""
    context = 512 if run.tiny else 131072
    table = budgets(engine, 0.39, True)
    candidates = (context - WINDOW) // 64
    kept = int(table.kept_tokens(candidates).sum()) + engine.shape.rows * (
        context - 64 * candidates
    )
    dense = engine.cache.pool.capacity // (context * engine.shape.rows)
    sparse = engine.cache.pool.capacity // kept
    run.record("sessions", context=context, dense=dense, tca=sparse, ratio=sparse / max(dense, 1))
    if run.tiny:
        return
    dense_ms = decode_step(run, engine, dense, context, "dense")
    sparse_ms = decode_step(run, engine, min(sparse, 24), context, "ragged")
    run.record(
        "sessions_rate",
        dense_tokens_per_s=dense / dense_ms * 1e3,
        tca_tokens_per_s=min(sparse, 24) / sparse_ms * 1e3,
    )


def prefix_hits(run: BenchRun, engine: Engine) -> None:
    """TTFT of 200 new tokens behind a long prefix: full, pruned, demoted to the host."""
    bus(run, engine)
    prefill_only_warm(engine, 1024 if run.tiny else 20480, "10")
    context = 2048 if run.tiny else 131072
    wanted = settings(budgets(engine, 0.1, True), budgets(engine, 0.39, True))
    tokens = random_tokens(engine, context, 9)
    cold = prefill(engine, tokens, wanted)
    release(engine, cold)

    def hit(name: str, seed: int, **extra: Any) -> None:
        follow = [*tokens.tolist(), *random_tokens(engine, 200, seed).tolist()]
        done = prefill(engine, torch.tensor(follow, dtype=torch.int32).numpy(), wanted)
        run.record(
            "prefix_hit",
            prefix=name,
            ttft_ms=done.seconds * 1e3,
            of_cold=done.seconds / cold.seconds,
            **extra,
        )
        release(engine, done)

    for seed in (1, 2):
        hit("full", seed)
    for seed in (3, 4):
        before = engine.cache.reclaimer.counts.demoted
        demote_seconds = clock(lambda: demote_all(engine))
        moved = engine.cache.reclaimer.counts.demoted - before
        size = moved * engine.cache.pool.kv[0].nbytes
        hit("demoted", seed, demoted_gb=size / 1e9, demote_gbps=size / demote_seconds / 1e9)
    again = prefill(engine, tokens, wanted)
    view = again.view
    if view is not None:
        prune = clock(lambda: engine.cache.prune(again.sequence, view.num_tokens, view.slots))
        run.record("prune", seconds=prune, kept=view.report["kept_ratio"])
    release(engine, again)
    for seed in (5, 6):
        hit("pruned", seed)
    usage = engine.cache.usage()
    run.record("usage", tree_over_full=usage.tree_slots / max(usage.full_equivalent_slots, 1))
    engine.cache.flush()


def bus(run: BenchRun, engine: Engine) -> None:
    """Bytes per second of scattered slots between the device and pinned host memory."""
    host, pool = engine.cache.reclaimer.host, engine.cache.pool
    assert host is not None
    count = 1000 if run.tiny else min(host.capacity, 8_000_000)
    # What the sections before cached would leave too little for the permutation.
    torch.cuda.empty_cache()
    order = torch.randperm(pool.capacity, dtype=torch.int32, device=engine.device)
    device_rows = order[:count].contiguous()
    host_rows = torch.arange(count, device=engine.device, dtype=torch.int32)
    size = count * pool.kv[0].nbytes / 1e9
    there, back = (pool.kv, device_rows), (host.kv, host_rows)
    # The last few are what copies beside the model's work may use.
    for programs in (None, 16, 32, COPY_PROGRAMS, 128):
        for _ in range(2):
            down = clock(partial(move_rows, *there, *back, programs))
            up = clock(partial(move_rows, *back, *there, programs))
        run.record(
            "bus",
            gb=size,
            programs=programs or "all",
            demote_gbps=size / down,
            promote_gbps=size / up,
        )


def demote_all(engine: Engine) -> None:
    """Ask for slots until every cold complete prefix has shrunk to its core."""
    reclaimer = engine.cache.reclaimer
    while node := engine.cache.tree.full.pop():
        reclaimer._shrink(node)


def clock(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def refreshes(run: BenchRun, engine: Engine) -> None:
    """A decode step that also selects a new view from the whole context, beside one that does not.

    One request alone: every request that is refreshed costs its own.
    """
    engine.warm_up()
    wanted = settings(budgets(engine, 0.10, ragged=True), budgets(engine, 0.39, ragged=True))
    for context in (2048,) if run.tiny else (8192, 32768, 131072):
        done = prefill(engine, random_tokens(engine, context, seed=3), wanted)
        ms = {}
        for name, refresh in (("plain", None), ("refresh", RequestSparsity(wanted))):
            step = StepInput([DecodeInput(done.sequence, SAMPLING, None, refresh)], [])
            times = []
            for _ in range(8):
                assert engine.cache.reserve([done.sequence])
                times.append(clock(lambda step=step: engine.run(step)))
            ms[name] = statistics.median(times) * 1e3
        run.record("refresh", context=context, step_ms=ms["plain"], refresh_step_ms=ms["refresh"])
        release(engine, done)
        engine.cache.flush()


def long_decode(run: BenchRun, engine: Engine) -> None:
    """One request alone, up to a million tokens."""
    engine.warm_up()
    engine.cache.pool.kv.normal_()
    for context in (512,) if run.tiny else (262144, 524288, 1048576):
        ms = {mode: decode_step(run, engine, 1, context, mode) for mode in ("dense", "ragged")}
        run.record("decode_ratio", batch=1, context=context, ragged=ms["dense"] / ms["ragged"])


SECTIONS: dict[str, Callable[[BenchRun, Engine], None]] = {
    "decode": decode,
    "sessions": sessions,
    "prefill": prefills,
    "served": served,
    "breakdown": breakdown,
    "hits": prefix_hits,
    "refresh": refreshes,
    "long_decode": long_decode,
    "long_prefill": long_prefill,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the engine at the 8B shape.")
    parser.add_argument("--tiny", action="store_true", help="dry run with a tiny model")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--host-gib", type=float, default=14.0)
    parser.add_argument("--output-dir", type=Path, default=Path("benchmark/results"))
    args = parser.parse_args()
    device = torch.device("cuda")
    run = BenchRun(device, torch.bfloat16, 0.0, args.tiny)
    engine = make_engine(
        "tiny" if args.tiny else args.model, 40000 if args.tiny else None, args.host_gib, "cuda"
    )
    assert NAMESPACE.prunable
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "engine.json"
    ceilings(run, engine)
    for name in args.only:
        with torch.inference_mode():
            SECTIONS[name](run, engine)
        path.write_text(json.dumps(run.results, indent=1))
    run.record("done", seconds=run.elapsed)
    print("wrote", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
