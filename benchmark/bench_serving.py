"""Load any OpenAI- or SGLang-compatible server and report latencies and throughput.

Run from the root of the repository: ``python -m benchmark.bench_serving --help``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
from tqdm import tqdm

from benchmark.serving import workloads
from benchmark.serving.client import BACKENDS, Endpoint, flush_cache, model_name, open_http
from benchmark.serving.load import run_closed_loop, run_open_loop
from benchmark.serving.metrics import RequestResult, summarise
from benchmark.serving.report import format_summary, plot, write_json
from benchmark.serving.sharegpt import DatasetError, user_turns


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if any request failed."""
    args = _parser().parse_args(argv)
    try:
        sessions = _sessions(args)
        results = asyncio.run(_run(args, sessions))
    except (DatasetError, ValueError) as error:
        sys.exit(f"error: {error}")
    except aiohttp.ClientError as error:
        sys.exit(f"error: {args.base_url}: {error}")
    summary = summarise(results, planned=sum(len(s.turns) for s in sessions))
    print(format_summary(summary))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings.pop("api_key")
    if args.output:
        write_json(args.output, settings, summary, results)
    if args.plot:
        plot(args.plot, f"{args.workload}, {args.backend}, {args.base_url}", results)
    return 1 if summary.errors else 0


async def _run(
    args: argparse.Namespace, sessions: Sequence[workloads.Session]
) -> list[RequestResult]:
    endpoint = Endpoint(
        base_url=args.base_url.rstrip("/"),
        backend=args.backend,
        model=args.model or "",
        ignore_eos=args.ignore_eos,
        temperature=args.temperature,
    )
    api_key = args.api_key or os.environ.get("OPENAI_API_KEY")
    async with open_http(args.timeout, api_key) as http:
        if args.model is None and args.backend != "sglang":
            endpoint = replace(endpoint, model=await model_name(http, endpoint.base_url))
        await _warm_up(http, endpoint, args)
        if args.flush_cache:
            await flush_cache(http, endpoint.base_url)
        results: list[RequestResult] = []
        errors = 0
        with tqdm(total=sum(len(s.turns) for s in sessions), unit="req") as bar:

            def on_result(result: RequestResult) -> None:
                nonlocal errors
                results.append(result)
                errors += result.error is not None
                bar.set_postfix(errors=errors, refresh=False)
                bar.update()

            if args.request_rate is not None:
                await run_open_loop(
                    http, endpoint, sessions, args.request_rate, args.seed, on_result
                )
            else:
                await run_closed_loop(http, endpoint, sessions, args.concurrency, on_result)
    return results


async def _warm_up(
    http: aiohttp.ClientSession, endpoint: Endpoint, args: argparse.Namespace
) -> None:
    # Prompts of their own: a warm-up must not put measured prefixes into the server's cache.
    sessions = workloads.random_sessions(args.warmup, 64, 8, 1.0, args.seed + 1)
    results: list[RequestResult] = []
    await run_closed_loop(http, endpoint, sessions, 1, results.append)
    for result in results:
        if result.error is not None:
            raise ValueError(f"warm-up request failed: {result.error}")


def _sessions(args: argparse.Namespace) -> list[workloads.Session]:
    if args.workload == "random":
        return workloads.random_sessions(
            args.num_sessions, args.input_len, args.output_len, args.range_ratio, args.seed
        )
    if args.workload == "shared-prefix":
        return workloads.shared_prefix_sessions(
            args.groups,
            args.questions,
            args.prefix_len,
            args.input_len,
            args.output_len,
            args.seed,
        )
    if args.synthetic:
        source = workloads.synthetic_conversations(args.num_sessions, args.max_turns, args.seed)
    else:
        source = user_turns()
    return workloads.multi_turn_sessions(
        source, args.num_sessions, args.max_turns, args.max_chars, args.output_len, args.seed
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.bench_serving",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    server = parser.add_argument_group("server")
    server.add_argument("--backend", choices=BACKENDS, default="sglang", help="protocol to speak")
    server.add_argument("--base-url", default="http://127.0.0.1:30000", help="server to load")
    server.add_argument("--model", help="model name to send; default: the first one listed")
    server.add_argument("--api-key", help="bearer token; else from OPENAI_API_KEY")
    server.add_argument("--timeout", type=float, default=600, help="seconds for one request")
    server.add_argument("--flush-cache", action="store_true", help="empty the prefix cache first")

    load = parser.add_argument_group("load")
    how = load.add_mutually_exclusive_group()
    how.add_argument("--concurrency", type=_positive, default=8, help="closed loop: clients")
    how.add_argument(
        "--request-rate",
        type=_positive_float,
        help="open loop: conversations started per second (Poisson)",
    )
    load.add_argument("--warmup", type=int, default=2, help="unmeasured requests sent first")
    load.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")

    work = parser.add_argument_group("workload")
    work.add_argument(
        "--workload", choices=("random", "shared-prefix", "multi-turn"), default="random"
    )
    work.add_argument(
        "--num-sessions", type=_positive, default=64, help="random, multi-turn: conversations"
    )
    work.add_argument("--input-len", type=_positive, default=256, help="words of a prompt/question")
    work.add_argument("--output-len", type=_positive, default=64, help="tokens of a reply")
    work.add_argument("--range-ratio", type=_share, default=0.5, help="random: shortest / longest")
    work.add_argument("--groups", type=_positive, default=8, help="shared-prefix: system prompts")
    work.add_argument("--questions", type=_positive, default=8, help="shared-prefix: per group")
    work.add_argument("--prefix-len", type=_positive, default=1024, help="shared-prefix: words")
    work.add_argument("--max-turns", type=_positive, default=5, help="multi-turn: per conversation")
    work.add_argument("--max-chars", type=_positive, default=2000, help="multi-turn: of a turn")
    work.add_argument(
        "--synthetic", action="store_true", help="multi-turn: random words, no download"
    )
    work.add_argument("--temperature", type=float, default=0.0)
    work.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="always generate --output-len tokens",
    )

    out = parser.add_argument_group("output")
    out.add_argument("--output", type=Path, help="JSON file to write")
    out.add_argument("--plot", type=Path, help="PNG file to write")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
