"""Compare our server on the CPU with Hugging Face transformers' ``generate``.

Run from the root of the repository: ``python -m benchmark.bench_cpu_vs_transformers``.

Both read the same GGUF file, compute in float32 with full attention, greedily, with the same
number of threads, from the same token ids, ignoring the end-of-sequence token. Our side is
measured by an HTTP client that streams. Each round measures every case on every side, one after
the other and in rotating order, so that a drifting machine slows all; the first round is warm-up.
While one side runs, the other processes are idle; the server's CPU use in that time is recorded.

Transformers runs twice: as it comes, where OpenMP threads spin for long while they wait, and with
the GOMP_SPINCOUNT that our launcher sets for itself. Targets are against the faster.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tqdm import tqdm

from benchmark.figures import Figure, all_passed, format_figures, load_before, save_figures
from benchmark.server_process import RunningServer, environment_with_threads, running_server
from benchmark.serving.client import generate, open_http
from benchmark.serving.metrics import RequestResult
from benchmark.serving.workloads import random_text
from benchmark.workers.pipe import Worker, running_worker
from tca_runtime.fetch_model import resolve
from tca_runtime.launch_server import SCHEDULER_ENVIRONMENT


@dataclass(frozen=True)
class Case:
    """One comparison: ``requests`` prompts at once on our side, one by one on the other."""

    name: str
    measure: Literal["decode", "output", "prefill"]
    target: float
    requests: int
    prompt_tokens: int
    new_tokens: int


CASES = (
    Case("decode, batch 1", "decode", 1.5, requests=1, prompt_tokens=128, new_tokens=128),
    Case("8 at once", "output", 2.5, requests=8, prompt_tokens=128, new_tokens=64),
    Case("prefill of 2048 tokens", "prefill", 1.0, requests=1, prompt_tokens=2048, new_tokens=1),
)


# Name of a transformers side -> what is added to its environment.
SPIN = "GOMP_SPINCOUNT"
BASELINES = {"as it comes": {}, "short spin": {SPIN: SCHEDULER_ENVIRONMENT[SPIN]}}


@dataclass(frozen=True)
class Sample:
    """Speeds of one round in tokens per second, and how many of the tokens agreed."""

    ours: float
    theirs: dict[str, float]
    same_tokens: float
    server_cpu_while_idle: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit status is 1 if a target is missed."""
    args = _parse(argv)
    path = resolve(args.model)
    flags = ["--model-path", str(path), "--dtype", "float32", "--device", "cpu", "--disable-tca"]
    worker_args = [str(path), "--threads", str(args.threads)]
    samples: dict[str, list[Sample]] = {case.name: [] for case in CASES}
    load_average = load_before()
    with ExitStack() as stack:
        server = stack.enter_context(running_server(flags, args.threads))
        workers = {
            name: stack.enter_context(
                running_worker(
                    "benchmark.workers.transformers_generate",
                    worker_args,
                    environment_with_threads(args.threads) | extra,
                )
            )
            for name, extra in BASELINES.items()
        }
        for number in tqdm(range(args.rounds + 1), unit="round"):
            for case in CASES:
                prompts = _prompts(workers["short spin"], case, seed=number)
                sample = _measure(case, prompts, server, workers, turn=number)
                if number > 0:
                    samples[case.name].append(sample)
    figures = [figure for case in CASES for figure in case_figures(case, samples[case.name])]
    print(format_figures(figures))
    rounds = {name: [vars(s) for s in values] for name, values in samples.items()}
    raw = {"load_average_before": load_average, "rounds": rounds}
    print(f"written to {save_figures('cpu_vs_transformers', vars(args), figures, raw)}")
    return 0 if all_passed(figures) else 1


def _prompts(worker: Worker, case: Case, seed: int) -> list[list[int]]:
    """Prompts that differ from each other and from every other round: no prefix is shared."""
    rng = random.Random(f"{case.name} {seed}")
    return [
        worker.ask(encode=random_text(rng, case.prompt_tokens))["ids"][: case.prompt_tokens]
        for _ in range(case.requests)
    ]


def _measure(
    case: Case,
    prompts: list[list[int]],
    server: RunningServer,
    workers: Mapping[str, Worker],
    turn: int,
) -> Sample:
    results: list[RequestResult] = []
    answers: dict[str, list[dict[str, Any]]] = {}
    idle_cpu: list[float] = []

    def ours() -> None:
        results.extend(asyncio.run(_ask_server(server.url, prompts, case.new_tokens)))

    def transformers(name: str) -> None:
        begin, cpu = time.perf_counter(), server.cpu_seconds()
        answers[name] = [
            workers[name].ask(input_ids=prompt, new_tokens=case.new_tokens) for prompt in prompts
        ]
        idle_cpu.append((server.cpu_seconds() - cpu) / (time.perf_counter() - begin))

    steps: list[Callable[[], None]] = [ours, *(partial(transformers, name) for name in workers)]
    first = turn % len(steps)
    for step in steps[first:] + steps[:first]:
        step()
    agreed = sum(
        a == b
        for result, answer in zip(results, answers["short spin"], strict=True)
        for a, b in zip(result.output_ids, answer["output_ids"], strict=True)
    )
    return Sample(
        ours=our_speed(case, results),
        theirs={name: their_speed(case, replies) for name, replies in answers.items()},
        same_tokens=agreed / (case.requests * case.new_tokens),
        server_cpu_while_idle=max(idle_cpu),
    )


async def _ask_server(
    url: str, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[RequestResult]:
    sampling = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    async with open_http(300) as http:
        results = await asyncio.gather(*(generate(http, url, p, sampling) for p in prompts))
    for result in results:
        if result.error is not None:
            raise RuntimeError(f"request to our server failed: {result.error}")
        if result.completion_tokens != new_tokens:
            raise RuntimeError(f"{result.completion_tokens} tokens came, {new_tokens} wanted")
    return results


def our_speed(case: Case, results: Sequence[RequestResult]) -> float:
    elapsed = max(r.end for r in results) - min(r.start for r in results)
    if case.measure == "prefill":
        return case.prompt_tokens / elapsed
    if case.measure == "output":
        return case.requests * case.new_tokens / elapsed
    per_token = results[0].tpot
    if per_token is None:
        raise RuntimeError("the reply did not come token by token")
    return 1 / per_token


def their_speed(case: Case, answers: Sequence[dict[str, Any]]) -> float:
    elapsed = float(sum(answer["seconds"] for answer in answers))
    if case.measure == "prefill":
        return case.prompt_tokens / elapsed
    if case.measure == "output":
        return case.requests * case.new_tokens / elapsed
    times = answers[0]["token_times"]
    return (len(times) - 1) / float(times[-1] - times[0])


def case_figures(case: Case, samples: Sequence[Sample]) -> list[Figure]:
    """Medians of both sides and their ratio, which is against the faster baseline."""
    ours = statistics.median(s.ours for s in samples)
    theirs = {
        name: statistics.median(s.theirs[name] for s in samples) for name in samples[0].theirs
    }
    fastest = max(theirs, key=lambda name: theirs[name])
    ratios = sorted(s.ours / s.theirs[fastest] for s in samples)
    same = statistics.mean(s.same_tokens for s in samples)
    busy = max(s.server_cpu_while_idle for s in samples)
    return [
        Figure(f"{case.name}: this server", ours, "tokens/s"),
        *(
            Figure(f"{case.name}: transformers, {name}", speed, "tokens/s")
            for name, speed in theirs.items()
        ),
        Figure(
            f"{case.name}: ratio",
            ours / theirs[fastest],
            "x",
            "at least",
            case.target,
            f"rounds {ratios[0]:.2f}..{ratios[-1]:.2f}; {same:.1%} of the tokens are the same; "
            f"our idle server used up to {busy:.1%} of a core",
        ),
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.bench_cpu_vs_transformers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="known model (smollm2-135m) or a GGUF file"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (5)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side (all cores)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
