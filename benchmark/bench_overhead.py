"""What the server adds to the engine's own time, and whether it sustains many streams.

Run from the root of the repository: ``python -m benchmark.bench_overhead``.

The model is a tiny one with random weights, so that everything but the engine dominates.

Overhead of a request at batch 1 = end-to-end time at an HTTP client, minus the time of a request
with the same prompt in the same scheduler loop and engine fed from memory in a process of its own
(benchmark/workers/engine_loop.py). So HTTP, tokenisation, ZMQ and detokenisation count as
overhead, and so do the client's own time and whatever the server does between two requests. The
sides are measured in turn, a block of requests back to back on each, every request with a prompt
of its own; the median of the differences prompt by prompt is reported, for whole replies and for
streams.

Then many clients stream at once, each one request after the other; no request may fail.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmark.figures import Figure, all_passed, format_figures, load_before, save_figures
from benchmark.server_process import running_server
from benchmark.serving.client import Endpoint, generate, open_http
from benchmark.serving.load import run_closed_loop
from benchmark.serving.metrics import RequestResult, Summary, summarise
from benchmark.serving.workloads import random_sessions, random_text
from benchmark.workers.pipe import Worker, running_worker

# A real tokenizer, so that tokenising and detokenising cost what they cost.
MODEL = ["--load-format", "dummy", "--model-config", "tiny", "--tokenizer-path", "smollm2-135m"]
LIMIT_MS = 5.0
TIMEOUT_S = 300


@dataclass(frozen=True)
class Pair:
    """Seconds of one request through HTTP, inside the server, and in the engine alone."""

    http: float
    server: float
    engine: float


@dataclass(frozen=True)
class Reply:
    """Seconds of one request at the client and inside the server, and its prompt's tokens."""

    seconds: float
    inside: float
    prompt_tokens: int


Ask = Callable[[aiohttp.ClientSession, str, str, dict[str, Any]], Awaitable[Reply]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit status is 1 if a target is missed."""
    args = _parse(argv)
    load_average = load_before()
    with running_server(MODEL) as server:
        with running_worker("benchmark.workers.engine_loop", MODEL) as engine:
            whole, streamed = asyncio.run(_pairs(server.url, engine, args))
        load = asyncio.run(_many_clients(server.url, args))
    figures = [
        *_overhead_figures("whole reply", whole),
        *_overhead_figures("streamed reply", streamed),
        *_load_figures(load, args),
    ]
    print(format_figures(figures))
    for message, count in load.error_messages.items():
        print(f"  {count} x {message}")
    raw = {
        "load_average_before": load_average,
        "whole": [asdict(p) for p in whole],
        "streamed": [asdict(p) for p in streamed],
        "load": asdict(load),
    }
    print(f"written to {save_figures('overhead', vars(args), figures, raw)}")
    return 0 if all_passed(figures) else 1


async def _pairs(
    url: str, engine: Worker, args: argparse.Namespace
) -> tuple[list[Pair], list[Pair]]:
    rng = random.Random(args.seed)
    whole: list[Pair] = []
    streamed: list[Pair] = []
    async with open_http(TIMEOUT_S) as http:
        for block in tqdm(range(args.blocks + 1), unit="block"):
            for ask, pairs in ((_whole, whole), (_streamed, streamed)):
                texts = [random_text(rng, args.input_len) for _ in range(args.block)]
                measured = await _block(http, url, engine, texts, args.output_len, ask)
                # The first block warms both sides up.
                pairs += measured if block else []
    return whole, streamed


async def _block(
    http: aiohttp.ClientSession,
    url: str,
    engine: Worker,
    texts: Sequence[str],
    output_len: int,
    ask: Ask,
) -> list[Pair]:
    sampling = {"max_new_tokens": output_len, "temperature": 0.0, "ignore_eos": True}
    replies = [await ask(http, url, text, sampling) for text in texts]
    pairs = []
    for text, reply in zip(texts, replies, strict=True):
        # In a thread: the loop must see it when the server closes an idle connection meanwhile.
        alone = await asyncio.to_thread(engine.ask, text=text, new_tokens=output_len)
        if alone["prompt_tokens"] != reply.prompt_tokens:
            raise RuntimeError(f"the engine saw {alone['prompt_tokens']} tokens for {reply}")
        pairs.append(Pair(reply.seconds, reply.inside, alone["seconds"]))
    return pairs


async def _whole(
    http: aiohttp.ClientSession, url: str, text: str, sampling: dict[str, Any]
) -> Reply:
    start = time.perf_counter()
    body = {"text": text, "sampling_params": sampling}
    async with http.post(url + "/generate", json=body) as response:
        response.raise_for_status()
        meta = (await response.json())["meta_info"]
    return Reply(time.perf_counter() - start, meta["e2e_latency"], meta["prompt_tokens"])


async def _streamed(
    http: aiohttp.ClientSession, url: str, text: str, sampling: dict[str, Any]
) -> Reply:
    result = await generate(http, url, text, sampling)
    if result.error is not None or result.server_latency is None:
        raise RuntimeError(f"request failed: {result.error or 'no e2e_latency'}")
    return Reply(result.e2e, result.server_latency, result.prompt_tokens)


async def _many_clients(url: str, args: argparse.Namespace) -> Summary:
    count = args.clients * args.requests_per_client
    sessions = random_sessions(count, args.input_len, args.output_len, 1.0, args.seed + 1)
    results: list[RequestResult] = []
    async with open_http(TIMEOUT_S) as http:
        with tqdm(total=count, unit="req") as bar:

            def on_result(result: RequestResult) -> None:
                results.append(result)
                bar.update()

            endpoint = Endpoint(url, "sglang")
            await run_closed_loop(http, endpoint, sessions, args.clients, on_result)
    return summarise(results, planned=count)


def _overhead_figures(name: str, pairs: Sequence[Pair]) -> list[Figure]:
    added = [(p.http - p.engine) * 1e3 for p in pairs]
    inside = statistics.median((p.server - p.engine) * 1e3 for p in pairs)
    engine = statistics.median(p.engine * 1e3 for p in pairs)
    total = statistics.median(p.http * 1e3 for p in pairs)
    if statistics.median(added) < 0:
        raise RuntimeError(
            f"{name}: the engine alone took longer than the whole server; "
            "something else keeps this machine busy, so nothing can be concluded"
        )
    return [
        Figure(f"{name}: engine alone", engine, "ms"),
        Figure(f"{name}: through HTTP", total, "ms"),
        Figure(
            f"{name}: overhead",
            statistics.median(added),
            "ms",
            limit=LIMIT_MS,
            detail=f"{inside:.2f} ms of it inside the server's own e2e_latency",
        ),
        Figure(f"{name}: overhead, 90th percentile", statistics.quantiles(added, n=10)[-1], "ms"),
    ]


def _load_figures(load: Summary, args: argparse.Namespace) -> list[Figure]:
    name = f"{args.clients} streaming clients"
    planned = args.clients * args.requests_per_client
    ttft = load.ttft_ms.p99 if load.ttft_ms is not None else float("nan")
    return [
        Figure(f"{name}: completed", load.completed, "requests", "at least", planned),
        Figure(f"{name}: errors", load.errors, "requests", limit=0),
        Figure(f"{name}: output", load.output_tokens_per_s, "tokens/s"),
        Figure(f"{name}: time to first token, p99", ttft, "ms"),
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.bench_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--blocks", type=int, default=8, help="measured, after one more (8)")
    parser.add_argument("--block", type=int, default=10, help="requests of a block (10)")
    parser.add_argument("--input-len", type=int, default=64, help="words of a prompt (64)")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of a reply (32)")
    parser.add_argument("--clients", type=int, default=200, help="that stream at once (200)")
    parser.add_argument("--requests-per-client", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
