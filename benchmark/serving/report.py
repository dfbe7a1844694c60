"""Show and keep a summary: table, JSON file, plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.serving.metrics import (
    Distribution,
    RequestResult,
    Summary,
    throughput_series,
)


def format_summary(summary: Summary) -> str:
    """A table for the terminal; errors stand first because they void the rest."""
    lines = [
        f"{'completed':<24}{summary.completed}",
        f"{'errors':<24}{summary.errors}",
        f"{'unsent turns':<24}{summary.unsent}",
        *(f"  {count} x {message}" for message, count in summary.error_messages.items()),
        f"{'duration':<24}{summary.duration_s:.2f} s",
        f"{'requests':<24}{summary.requests_per_s:.2f} /s",
        f"{'input tokens':<24}{summary.prompt_tokens} ({summary.input_tokens_per_s:.1f} /s)",
        f"{'output tokens':<24}{summary.completion_tokens} ({summary.output_tokens_per_s:.1f} /s)",
        f"{'cached input tokens':<24}{_cached(summary)}",
        "",
        f"{'milliseconds':<24}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
        _row("time to first token", summary.ttft_ms),
        _row("time per output token", summary.tpot_ms),
        _row("gap between chunks", summary.chunk_gap_ms),
        _row("end to end", summary.e2e_ms),
    ]
    return "\n".join(lines)


def write_json(
    path: Path,
    settings: Mapping[str, Any],
    summary: Summary,
    results: Sequence[RequestResult],
) -> None:
    """Write settings, summary and one compact record per request (without its text)."""
    origin = min((r.start for r in results), default=0.0)
    requests = [
        {
            "start_s": r.start - origin,
            "ttft_s": r.ttft,
            "tpot_s": r.tpot,
            "e2e_s": r.e2e,
            "prompt_tokens": r.prompt_tokens,
            "completion_tokens": r.completion_tokens,
            "cached_tokens": r.cached_tokens,
            "error": r.error,
        }
        for r in results
    ]
    document = {"settings": dict(settings), "summary": asdict(summary), "requests": requests}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def plot(path: Path, title: str, results: Sequence[RequestResult]) -> None:
    """Draw latency CDFs and the output throughput over time as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [r for r in results if r.error is None]
    figure, (latency, per_token, rate) = plt.subplots(1, 3, figsize=(15, 4.2))
    _cdf(latency, [r.ttft for r in good if r.ttft is not None], 1.0, "time to first token")
    _cdf(latency, [r.e2e for r in good], 1.0, "end to end")
    latency.set(xlabel="seconds", ylabel="share of requests", ylim=(0, 1))
    latency.legend(loc="lower right")
    _cdf(per_token, [r.tpot for r in good if r.tpot is not None], 1e3, "time per output token")
    per_token.set(xlabel="milliseconds", ylabel="share of requests", ylim=(0, 1))
    per_token.legend(loc="lower right")
    starts, rates = throughput_series(results, bin_s=1.0)
    rate.step(starts, rates, where="post")
    rate.set(xlabel="seconds", ylabel="output tokens per second", ylim=(0, None))
    for axis in (latency, per_token, rate):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cdf(axis: Any, values: Sequence[float], scale: float, label: str) -> None:
    ordered = sorted(value * scale for value in values)
    axis.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=label)


def _row(name: str, d: Distribution | None) -> str:
    if d is None:
        return f"{name:<24}{'not measured':>12}"
    cells = "".join(f"{value:>10.2f}" for value in (d.mean, d.p50, d.p90, d.p99, d.max))
    return f"{name:<24}{cells}"


def _cached(summary: Summary) -> str:
    if summary.cached_tokens is None:
        return "not reported"
    share = summary.cached_tokens / max(1, summary.prompt_tokens)
    return f"{summary.cached_tokens} ({share:.1%})"
