"""Mixed against alternating batches: is a prompt computed in the steps that decode, or between?

Run from the root of the repository: ``python -m benchmark.bench_batching``.

Servers with the same model stand side by side: mixed as by default, where the prompt's part of a
step is limited so that streams go on (``--max-decode-slowdown``); mixed without that limit; and
alternating. Each takes the same prompts in turn, several rounds, so that a machine that slows down
slows all. A closed loop of clients keeps prompts arriving while others decode. Reported are the
medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict

from tqdm import tqdm

from benchmark.figures import Figure, format_figures, load_before, save_figures
from benchmark.server_process import running_server
from benchmark.serving.client import Endpoint, open_http
from benchmark.serving.load import run_closed_loop
from benchmark.serving.metrics import RequestResult, Summary, summarise
from benchmark.serving.workloads import random_sessions

WAYS = {
    "mixed": [],
    "mixed without a limit": ["--max-decode-slowdown", "0"],
    "alternating": ["--no-mixed-batches"],
}
TIMEOUT_S = 600


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save."""
    args = _parse(argv)
    load_average = load_before()
    runs: dict[str, list[Summary]] = {way: [] for way in WAYS}
    flags = ["--model-path", args.model_path, "--max-total-tokens", "16384", *args.flags]
    with contextlib.ExitStack() as stack:
        servers = {w: stack.enter_context(running_server([*flags, *WAYS[w]])) for w in WAYS}
        for round_ in tqdm(range(args.rounds + 1), unit="round"):
            for way in sorted(WAYS, reverse=bool(round_ % 2)):
                summary = asyncio.run(_load(servers[way].url, args, round_))
                # The first round warms both up.
                runs[way] += [summary] if round_ else []
    figures = [figure for way in WAYS for figure in _figures(way, runs[way])]
    print(format_figures(figures))
    raw = {"load_average_before": load_average} | {w: [asdict(s) for s in runs[w]] for w in WAYS}
    print(f"written to {save_figures('batching', vars(args), figures, raw)}")
    return 0


async def _load(url: str, args: argparse.Namespace, round_: int) -> Summary:
    # Prompts of their own in each round: none may be found in the cache.
    sessions = random_sessions(args.requests, args.input_len, args.output_len, 0.5, round_)
    results: list[RequestResult] = []
    async with open_http(TIMEOUT_S) as http:
        endpoint = Endpoint(url, "sglang")
        await run_closed_loop(http, endpoint, sessions, args.clients, results.append)
    summary = summarise(results, planned=args.requests)
    if summary.errors:
        raise RuntimeError(f"requests failed: {summary.error_messages}")
    return summary


def _figures(way: str, runs: Sequence[Summary]) -> list[Figure]:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    first = [run.ttft_ms for run in runs if run.ttft_ms]
    each = [run.tpot_ms for run in runs if run.tpot_ms]
    gaps = [run.chunk_gap_ms for run in runs if run.chunk_gap_ms]
    return [
        Figure(f"{way}: output", median([r.output_tokens_per_s for r in runs]), "tokens/s"),
        Figure(f"{way}: time to first token, p50", median([d.p50 for d in first]), "ms"),
        Figure(f"{way}: time to first token, p99", median([d.p99 for d in first]), "ms"),
        Figure(f"{way}: time per output token, p50", median([d.p50 for d in each]), "ms"),
        Figure(f"{way}: gap between chunks, p99", median([d.p99 for d in gaps]), "ms"),
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.bench_batching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5, help="measured, after one more (5)")
    parser.add_argument("--requests", type=int, default=24, help="of a round (24)")
    parser.add_argument("--clients", type=int, default=8, help="that ask at once (8)")
    parser.add_argument("--input-len", type=int, default=384, help="longest prompt, words (384)")
    parser.add_argument("--output-len", type=int, default=48, help="longest reply, tokens (48)")
    parser.add_argument("flags", nargs="*", help="of both servers, after --")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
