"""How much do long prompts that arrive slow running streams down?

Starts our server, lets streams decode undisturbed, then sends one long prompt after another, then
leaves the streams alone again, and compares the gaps between the tokens that they receive (not
between pieces of text, which may have to wait until a character is whole). The streams grow while
a prompt is computed, and with them their own steps: quiet is the mean of before and after. Each
``--flags`` is a case of its own. Run from the root of the repository:
``python -m benchmark.bench_interference --help``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import aiohttp
import numpy as np

from benchmark.figures import Figure, all_passed, format_figures, load_before, save_figures
from benchmark.server_process import running_server
from benchmark.serving.client import generate, open_http
from benchmark.serving.metrics import RequestResult

# Token ids of prompts: below any model's vocabulary, above its special ids.
TOKEN_IDS = range(20, 250)
# How much longer the longest gaps may get.
LIMIT = 3.0
# That a stream may take; a long prompt on a CPU takes minutes.
MOST_SECONDS = 3600
# What the limit on steps changes; the last two are servers as they are by default.
DEFAULT_CASES = ("--max-decode-slowdown 0", "--disable-tca", "")


@dataclass(frozen=True)
class Gaps:
    """Milliseconds between a stream's tokens, over all streams."""

    count: int
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True)
class Case:
    """One server. ``ratio`` is of 99th percentiles, with long prompts to the mean of the quiet ones
    before (``quiet``) and after."""

    flags: str
    quiet: Gaps
    busy: Gaps
    after: Gaps
    ratio: float
    long_prompts: int
    long_ttft_s: float
    prefill_tokens_per_s: float
    errors: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cases; the exit status is 1 if a request failed or the last case is too slow."""
    args = _parser().parse_args(argv)
    load = load_before()
    cases = []
    for flags in args.flags or DEFAULT_CASES:
        server_flags = ["--model-path", args.model, *flags.split()]
        with running_server(server_flags) as server:
            cases.append(asyncio.run(_measure(server.url, flags, args)))
    figures = [figure for case in cases for figure in _figures(case, case is cases[-1])]
    print(format_figures(figures))
    settings = {**vars(args), "load_before": load}
    raw = {"cases": [asdict(case) for case in cases]}
    print(f"written to {save_figures(args.name, settings, figures, raw)}")
    return 0 if all_passed(figures) else 1


def _figures(case: Case, judged: bool) -> list[Figure]:
    name = case.flags.strip() or "defaults"
    after = f"p50 {case.after.p50_ms:.1f} ms"
    p50 = f"p50 {case.quiet.p50_ms:.1f} -> {case.busy.p50_ms:.1f} ms"
    return [
        Figure(f"{name}: p99 of gaps, quiet", case.quiet.p99_ms, "ms"),
        Figure(f"{name}: p99 of gaps, quiet again", case.after.p99_ms, "ms", detail=after),
        Figure(f"{name}: p99 of gaps, with long prompts", case.busy.p99_ms, "ms", detail=p50),
        Figure(f"{name}: ratio", case.ratio, "x", limit=LIMIT if judged else None),
        Figure(
            f"{name}: prefill",
            case.prefill_tokens_per_s,
            "tokens/s",
            detail=f"{case.long_prompts} long prompts",
        ),
        Figure(f"{name}: errors", len(case.errors), "requests", limit=0),
    ]


async def _measure(url: str, flags: str, args: argparse.Namespace) -> Case:
    draw = random.Random(args.seed)
    async with open_http(MOST_SECONDS) as http:
        first = _prompt(draw, args.long_prompt)
        if args.cached:
            await _run(http, url, first[: args.cached], 1)
        streams = [
            asyncio.create_task(_run(http, url, _prompt(draw, args.stream_prompt), args.stream_len))
            for _ in range(args.streams)
        ]
        await _all_started(http, url, args.streams)
        await asyncio.sleep(args.settle)
        quiet_begin = time.perf_counter()
        await asyncio.sleep(args.quiet)
        busy_begin = time.perf_counter()
        long = [await _run(http, url, first, 1)]
        while time.perf_counter() - busy_begin < args.busy:
            long.append(await _run(http, url, _prompt(draw, args.long_prompt), 1))
        busy_end = time.perf_counter()
        await asyncio.sleep(args.quiet)
        end = time.perf_counter()
        if any(stream.done() for stream in streams):
            raise SystemExit("error: a stream ended too soon; raise --stream-len")
        await _abort_all(http, url)
        results = await asyncio.gather(*streams)
    quiet, after = _gaps(results, quiet_begin, busy_begin), _gaps(results, busy_end, end)
    busy = _gaps(results, busy_begin, busy_end)
    return Case(
        flags=flags,
        quiet=quiet,
        busy=busy,
        after=after,
        # The streams grow meanwhile, and their own steps with them.
        ratio=2 * busy.p99_ms / (quiet.p99_ms + after.p99_ms),
        long_prompts=len(long),
        long_ttft_s=float(np.mean([result.e2e for result in long])),
        prefill_tokens_per_s=(len(long) * args.long_prompt - args.cached) / (busy_end - busy_begin),
        # The streams ran until they were aborted, or the measurement would have stopped.
        errors=[result.error for result in long if result.error],
    )


def _prompt(draw: random.Random, length: int) -> list[int]:
    return draw.choices(TOKEN_IDS, k=length)


async def _run(
    http: aiohttp.ClientSession, url: str, prompt: Sequence[int], max_new_tokens: int
) -> RequestResult:
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0.8, "ignore_eos": True}
    return await generate(http, url, prompt, sampling)


async def _all_started(http: aiohttp.ClientSession, url: str, streams: int) -> None:
    """Wait until every stream decodes: nothing waits, no prompt is being computed."""
    deadline = time.monotonic() + 120
    generated = -1.0
    while time.monotonic() < deadline:
        async with http.get(url + "/server_info") as response:
            state: dict[str, Any] = await response.json()
        prefilling = state["prompt_tokens_total"] != generated
        generated = state["prompt_tokens_total"]
        if state["num_running_reqs"] == streams and not prefilling:
            return
        await asyncio.sleep(1.0)
    raise SystemExit("error: the streams did not start in time")


async def _abort_all(http: aiohttp.ClientSession, url: str) -> None:
    async with http.post(url + "/abort_request", json={"abort_all": True}) as response:
        response.raise_for_status()


def _gaps(results: Sequence[RequestResult], begin: float, end: float) -> Gaps:
    """Of the tokens that arrived in a period."""
    gaps = [
        (later - earlier) * 1000
        for result in results
        for earlier, later in pairwise(result.token_times)
        if begin <= later < end
    ]
    p50, p99 = np.percentile(gaps, [50, 99]).tolist()
    return Gaps(len(gaps), p50, p99, max(gaps))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.bench_interference",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m", help="model to serve")
    parser.add_argument(
        "--flags",
        action="append",
        help="server flags of a case, in one string; the last case is judged",
    )
    parser.add_argument("--streams", type=int, default=32, help="requests that decode")
    parser.add_argument("--stream-prompt", type=int, default=64, help="their prompts' tokens")
    parser.add_argument("--stream-len", type=int, default=4000, help="tokens they may generate")
    parser.add_argument("--long-prompt", type=int, default=7000, help="tokens of a long prompt")
    parser.add_argument(
        "--cached",
        type=int,
        default=0,
        help="its tokens that are computed before the streams",
    )
    parser.add_argument("--settle", type=float, default=3, help="unmeasured seconds at first")
    parser.add_argument("--quiet", type=float, default=12, help="seconds without long prompts")
    parser.add_argument("--busy", type=float, default=25, help="seconds with them, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--name", default="interference", help="of the file of results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
