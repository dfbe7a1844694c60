"""Decode steps under the real scheduler, with and without overlap of host and device.

    PYTHONPATH=.:kernels:python python benchmark/gpu/bench_overlap.py

Random weights, no HTTP. Columns, all per decode step:

step    wall time from one step's tokens to the next one's
device  time the device takes, everything queued beforehand
idle    step - device: what the device waits for the host
host    time the host works: messages, planning, launching, replies (waiting left out)

``--tiny`` is a dry run on a small model, on the CPU if there is no GPU (then without overlap).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tca_runtime.config import CacheArgs, ModelArgs, RuntimeConfig, SchedulerArgs, SparsityArgs
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.output import LaunchedStep
from tca_runtime.engine.step import StepInput
from tca_runtime.messages import AbortRequest
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.in_memory import in_memory_scheduler

SLEEP_CYCLES = 40_000_000
PROBES = 9
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
}


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds, medians."""

    model: str
    sampling: str
    batch: int
    overlap: bool
    step: float
    device: float
    host: float

    @property
    def idle(self) -> float:
        return self.step - self.device


class TimedEngine:
    """Stands before an engine's ``launch``: times the device, and the host's waiting."""

    def __init__(self, engine: Engine) -> None:
        self.waited = 0.0
        self.probing = False
        self._inner = engine.launch
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        cast("Any", engine).launch = self._launch

    def device_ms(self) -> float:
        torch.cuda.synchronize()
        events, self._events = self._events, []
        return statistics.median(begin.elapsed_time(end) for begin, end in events)

    def _launch(self, step: StepInput) -> LaunchedStep:
        if self.probing:
            # Keeps the device busy until the host has queued the whole step.
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
            begin = torch.cuda.Event(enable_timing=True)
            begin.record()
        launched = self._inner(step)
        if self.probing:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((begin, end))
        result = launched.result

        def timed_result() -> Any:
            start = time.perf_counter()
            output = result()
            self.waited += time.perf_counter() - start
            return output

        cast("Any", launched).result = timed_result
        return launched


def make_config(args: argparse.Namespace, model: str) -> RuntimeConfig:
    tokens = max(args.batches) * (args.context + args.steps + 1000)
    return RuntimeConfig(
        model=ModelArgs(load_format="dummy", model_config=model, device=args.device),
        cache=CacheArgs(max_total_tokens=tokens),
        scheduler=SchedulerArgs(max_running_requests=max(args.batches), chunked_prefill_size=8192),
        sparsity=SparsityArgs(disable_tca=args.kept is None, tca_config=args.kept),
    )


def decode(
    config: RuntimeConfig, engine: Engine, timed: TimedEngine, args: argparse.Namespace, **row: Any
) -> Row:
    """Let a batch decode under one scheduler; prompts are random and of equal length."""
    scheduler, inbox, _ = in_memory_scheduler(config, engine, 1 << 20)
    rng = np.random.default_rng(0)
    sampling = SamplingParams(
        max_new_tokens=args.steps + 500, ignore_eos=True, seed=0, **SAMPLING[row["sampling"]]
    )
    for i in range(row["batch"]):
        inbox.submit(str(i), rng.integers(0, 256, args.context), sampling)
    while len(scheduler.planner.running) < row["batch"] or scheduler.planner.prefilling:
        scheduler.run_once()
    for _ in range(20):
        scheduler.run_once()
    walls, hosts = [], []
    for _ in range(args.steps):
        timed.waited = 0.0
        begin = time.perf_counter()
        scheduler.run_once()
        walls.append(time.perf_counter() - begin)
        hosts.append(walls[-1] - timed.waited)
    device = 0.0
    if engine.is_asynchronous:
        timed.probing = True
        for _ in range(PROBES):
            scheduler.run_once()
        timed.probing = False
        device = timed.device_ms()
    inbox.messages.append(AbortRequest(rid=""))
    scheduler.run_once()
    while not scheduler.planner.is_idle:
        scheduler.run_once()
    engine.cache.flush()
    step, host = (statistics.median(times) * 1e3 for times in (walls, hosts))
    return Row(step=step, device=device, host=host, **row)


def show(row: Row) -> None:
    print(
        f"{row.model:14s} {row.sampling:7s} {row.batch:5d}  {'on ' if row.overlap else 'off'}    "
        f"{row.step:8.3f} {row.device:8.3f} {row.idle:8.3f} ({100 * row.idle / row.step:4.1f} %) "
        f"{row.host:8.3f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b", "tiny"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kept", help="TCA, e.g. uniform:0.39 (full attention)")
    parser.add_argument("--tiny", action="store_true", help="dry run")
    parser.add_argument("--output", type=Path, default=Path("benchmark/results/overlap.json"))
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.tiny:
        args.models, args.batches, args.context, args.steps = ["tiny"], [1, 3], 300, 20
    print("ms             sampl.  batch  overlap     step   device     idle               host")
    rows = []
    for model in args.models:
        config = make_config(args, model)
        engine = Engine(config)
        engine.warm_up()
        timed = TimedEngine(engine)
        for sampling in SAMPLING:
            for batch in args.batches:
                for overlap in (False, True)[: 1 + engine.is_asynchronous]:
                    scheduler = replace(config.scheduler, disable_overlap=not overlap)
                    rows.append(
                        decode(
                            replace(config, scheduler=scheduler),
                            engine,
                            timed,
                            args,
                            model=model,
                            sampling=sampling,
                            batch=batch,
                            overlap=overlap,
                        )
                    )
                    show(rows[-1])
        del engine, timed
        gc.collect()
        torch.cuda.empty_cache()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps([asdict(row) | {"idle": row.idle} for row in rows], indent=1))
    print("wrote", args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
