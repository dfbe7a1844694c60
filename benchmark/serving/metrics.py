"""What one request did, and the arithmetic from many of them to a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class RequestResult:
    """One finished request. Times are seconds of one monotonic clock.

    ``text_times`` holds the arrival of every chunk that carried new text, ``token_times`` of every
    chunk that counted more tokens (SGLang's count them in each chunk). Token counts are the
    server's own; ``cached_tokens`` and ``server_latency`` are None where it does not report them.
    A failed request has ``error`` set and counts for nothing else.
    """

    start: float
    end: float
    text_times: tuple[float, ...] = ()
    token_times: tuple[float, ...] = ()
    text: str = ""
    output_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    server_latency: float | None = None
    error: str | None = None

    @property
    def e2e(self) -> float:
        return self.end - self.start

    @property
    def ttft(self) -> float | None:
        """Send to first text; None where no text came (only special tokens, or 0 asked for)."""
        return self.text_times[0] - self.start if self.text_times else None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None where one chunk brought everything."""
        if self.completion_tokens < 2 or len(self.text_times) < 2:
            return None
        return (self.text_times[-1] - self.text_times[0]) / (self.completion_tokens - 1)


@dataclass(frozen=True)
class Distribution:
    """Of a latency, in milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Summary:
    """Of one run. ``unsent`` requests are later turns of conversations that failed."""

    duration_s: float
    completed: int
    errors: int
    unsent: int
    error_messages: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    chunk_gap_ms: Distribution | None
    e2e_ms: Distribution | None


def distribution(seconds: Sequence[float]) -> Distribution | None:
    """Linear-interpolated percentiles; None for no values."""
    if not seconds:
        return None
    ms = np.asarray(seconds, dtype=np.float64) * 1e3
    p50, p90, p99 = np.percentile(ms, [50, 90, 99])
    return Distribution(
        len(seconds), float(ms.mean()), float(p50), float(p90), float(p99), float(ms.max())
    )


def summarise(results: Sequence[RequestResult], planned: int) -> Summary:
    """Summarise a run in which ``planned`` requests were meant to be sent.

    The duration spans first send to last end, failed requests included, so that a server does
    not look faster for failing.
    """
    good = [r for r in results if r.error is None]
    duration = max((r.end for r in results), default=0.0) - min(
        (r.start for r in results), default=0.0
    )
    prompt_tokens = sum(r.prompt_tokens for r in good)
    completion_tokens = sum(r.completion_tokens for r in good)
    cached = [r.cached_tokens for r in good if r.cached_tokens is not None]
    return Summary(
        duration_s=duration,
        completed=len(good),
        errors=len(results) - len(good),
        unsent=planned - len(results),
        error_messages=dict(Counter(r.error for r in results if r.error is not None)),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cached_tokens=sum(cached) if cached else None,
        requests_per_s=_rate(len(good), duration),
        input_tokens_per_s=_rate(prompt_tokens, duration),
        output_tokens_per_s=_rate(completion_tokens, duration),
        ttft_ms=distribution([r.ttft for r in good if r.ttft is not None]),
        tpot_ms=distribution([r.tpot for r in good if r.tpot is not None]),
        chunk_gap_ms=distribution([gap for r in good for gap in chunk_gaps(r)]),
        e2e_ms=distribution([r.e2e for r in good]),
    )


def chunk_gaps(result: RequestResult) -> list[float]:
    return [after - before for before, after in pairwise(result.text_times)]


def throughput_series(
    results: Sequence[RequestResult], bin_s: float
) -> tuple[list[float], list[float]]:
    """Output tokens per second over time: bin starts (seconds from the first send) and rates.

    A request's tokens are spread evenly over its text chunks: servers report totals only.
    """
    good = [r for r in results if r.error is None and r.text_times]
    if not good:
        return [], []
    origin = min(r.start for r in results)
    last = max(r.text_times[-1] for r in good) - origin
    tokens = np.zeros(int(last // bin_s) + 1)
    for r in good:
        share = r.completion_tokens / len(r.text_times)
        for t in r.text_times:
            tokens[int((t - origin) // bin_s)] += share
    starts = [i * bin_s for i in range(len(tokens))]
    return starts, [float(value) for value in tokens / bin_s]


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
