"""What the server adds to the engine's own time, and whether it sustains many streams.

Run from the root of the repository: ``python -m benchmark.bench_overhead``.

The model is a tiny one with random weights, so that everything but the engine dominates.

Overhead of a request at batch 1 = end-to-end time at an HTTP client, minus the time its scheduler
was busy with it, from taking it out of the inbox to having its last token
(benchmark/workers/timed_server.py). So HTTP, tokenisation, ZMQ and detokenisation count as
overhead, and so does the client's own time. Both are times of the same request in the same
processes: the same model in another process is faster or slower by up to a fifth, by where its
memory lies.

A stream also slows the engine itself, whose cores the tokenizer process and the client then share.
So a streamed request is compared with the engine's time of a whole reply just before or after it.
The medians over all requests are reported.

Then many clients stream at once, each one request after the other; no request may fail.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmark.figures import Figure, all_passed, format_figures, load_before, save_figures
from benchmark.server_process import running_server
from benchmark.serving.client import Endpoint, generate, open_http
from benchmark.serving.load import run_closed_loop
from benchmark.serving.metrics import RequestResult, Summary, summarise
from benchmark.serving.workloads import random_sessions, random_text

# A real tokenizer, so that tokenising and detokenising cost what they cost.
MODEL = ["--load-format", "dummy", "--model-config", "tiny", "--tokenizer-path", "smollm2-135m"]
LIMIT_MS = 5.0
TIMEOUT_S = 300
# Pairs before the measured ones.
WARM_UP = 10


@dataclass(frozen=True)
class Reply:
    """Seconds of one request: at the client, by the server's own account, in its scheduler."""

    http: float
    server: float
    engine: float


@dataclass(frozen=True)
class Pair:
    """A whole reply and a streamed one of as many tokens, one right after the other."""

    whole: Reply
    streamed: Reply


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit status is 1 if a target is missed."""
    args = _parse(argv)
    load_average = load_before()
    with tempfile.TemporaryDirectory() as directory:
        times = Path(directory) / "times"
        os.environ["TIMES_FILE"] = str(times)
        with running_server(MODEL, module="benchmark.workers.timed_server") as server:
            pairs = asyncio.run(_pairs(server.url, times, args))
            load = asyncio.run(_many_clients(server.url, args))
    figures = [
        *_overhead_figures("whole reply", [(p.whole, p.whole.engine) for p in pairs]),
        *_overhead_figures("streamed reply", [(p.streamed, p.whole.engine) for p in pairs]),
        *_load_figures(load, args),
    ]
    print(format_figures(figures))
    for message, count in load.error_messages.items():
        print(f"  {count} x {message}")
    raw = {
        "load_average_before": load_average,
        "pairs": [asdict(p) for p in pairs],
        "load": asdict(load),
    }
    print(f"written to {save_figures('overhead', vars(args), figures, raw)}")
    return 0 if all_passed(figures) else 1


async def _pairs(url: str, times: Path, args: argparse.Namespace) -> list[Pair]:
    rng = random.Random(args.seed)
    sampling = {"max_new_tokens": args.output_len, "temperature": 0.0, "ignore_eos": True}
    pairs = []
    async with open_http(TIMEOUT_S) as http:
        for i in tqdm(range(WARM_UP + args.pairs), unit="pair"):
            whole, streamed = (random_text(rng, args.input_len) for _ in range(2))
            if i % 2:
                second = await _streamed(http, url, streamed, sampling, times)
                pair = Pair(await _whole(http, url, whole, sampling, times), second)
            else:
                first = await _whole(http, url, whole, sampling, times)
                pair = Pair(first, await _streamed(http, url, streamed, sampling, times))
            pairs.append(pair)
    return pairs[WARM_UP:]


async def _whole(
    http: aiohttp.ClientSession, url: str, text: str, sampling: dict[str, Any], times: Path
) -> Reply:
    start = time.perf_counter()
    body = {"text": text, "sampling_params": sampling}
    async with http.post(url + "/generate", json=body) as response:
        response.raise_for_status()
        meta = (await response.json())["meta_info"]
    return Reply(time.perf_counter() - start, meta["e2e_latency"], _last_time(times))


async def _streamed(
    http: aiohttp.ClientSession, url: str, text: str, sampling: dict[str, Any], times: Path
) -> Reply:
    result = await generate(http, url, text, sampling)
    if result.error is not None or result.server_latency is None:
        raise RuntimeError(f"request failed: {result.error or 'no e2e_latency'}")
    return Reply(result.e2e, result.server_latency, _last_time(times))


def _last_time(times: Path) -> float:
    return float(times.read_text().split()[-1])


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


def _overhead_figures(name: str, measured: Sequence[tuple[Reply, float]]) -> list[Figure]:
    """``measured``: replies, and the seconds that the engine alone needs for each."""
    added = [(reply.http - engine) * 1e3 for reply, engine in measured]
    inside = statistics.median((reply.server - engine) * 1e3 for reply, engine in measured)
    return [
        Figure(f"{name}: engine alone", statistics.median(e for _, e in measured) * 1e3, "ms"),
        Figure(f"{name}: through HTTP", statistics.median(r.http for r, _ in measured) * 1e3, "ms"),
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
    parser.add_argument(
        "--pairs", type=int, default=200, help="of a whole and a streamed reply (200)"
    )
    parser.add_argument("--input-len", type=int, default=64, help="words of a prompt (64)")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of a reply (32)")
    parser.add_argument("--clients", type=int, default=200, help="that stream at once (200)")
    parser.add_argument("--requests-per-client", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
