"""Prometheus metrics: SGLang's names where the meaning is the same, ``tca:`` for the rest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from math import inf
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from tca_runtime.server.loads import load_figures
from tca_runtime.tokenizer.manager import TokenizerManager
from tca_runtime.tokenizer.state import RequestState

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Phases of a request, which add up to its latency.
STAGES = ("tokenize", "queue", "prefill", "decode")

# Of the scheduler's load: name there -> metric.
_GAUGES = {
    "num_running_reqs": ("sglang:num_running_reqs", "requests that prefill or decode"),
    "num_waiting_reqs": ("sglang:num_queue_reqs", "requests that wait for admission"),
    "num_used_tokens": ("sglang:num_used_tokens", "tokens' worth of slots that cannot be reused"),
    "max_total_num_tokens": ("sglang:max_total_num_tokens", "tokens a full cache holds"),
    "token_usage": ("sglang:token_usage", "num_used_tokens / max_total_num_tokens"),
    "gen_throughput": ("sglang:gen_throughput", "generated tokens per second"),
    "cache_hit_rate": ("sglang:cache_hit_rate", "prompt tokens found in the cache, of all"),
    "utilization": ("sglang:utilization", "running requests, of the most that may run"),
}
# Of the scheduler's state: name there -> metric.
_COUNTERS = {
    "num_retractions": ("sglang:num_retracted_requests", "requests sent back to wait: no slots"),
    "num_raised": ("tca:num_raised_requests", "requests that were not sure and read more"),
    "num_steps": ("tca:steps", "steps of the engine"),
    "step_seconds_total": ("tca:step_seconds", "time spent in steps"),
}


class TokenGaps:
    """A histogram of the times between tokens, which takes many equal ones at once."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, count: int) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += count
        self._sum += seconds * count

    def collect(self, model: str) -> Metric:
        family = HistogramMetricFamily(
            "sglang:inter_token_latency_seconds", "between two tokens", labels=["model_name"]
        )
        bounds = map(floatToGoString, (*_SECONDS, inf))
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family.add_metric([model], buckets, self._sum)
        return family


class Metrics:
    """Counts what the manager reports and shows what the scheduler's heartbeats say."""

    def __init__(self, manager: TokenizerManager) -> None:
        self._registry = CollectorRegistry()
        self._manager = manager
        self._last_token: dict[str, float] = {}
        self._requests = self._counter("sglang:num_requests", "finished requests")
        self._aborted = self._counter("sglang:num_aborted_requests", "aborted requests")
        self._prompt_tokens = self._counter("sglang:prompt_tokens", "prompt tokens")
        self._cached_tokens = self._counter("sglang:cached_tokens", "prompt tokens from the cache")
        self._generation_tokens = self._counter("sglang:generation_tokens", "generated tokens")
        self._ttft = self._histogram("sglang:time_to_first_token_seconds", "until the first token")
        self._itl = TokenGaps()
        self._e2e = self._histogram("sglang:e2e_request_latency_seconds", "until the end")
        self._queue = self._histogram("sglang:queue_time_seconds", "waiting for admission")
        self._kept = self._histogram("tca:kept_ratio", "of the prompt, in the view", _RATIOS)
        self._dropped = self._histogram(
            "tca:dropped_mass", "attention mass outside the view", (0.001, 0.005, *_RATIOS)
        )
        stages = Histogram(
            "sglang:per_stage_req_latency_seconds",
            "time in each phase of a request",
            ["model_name", "stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        model = manager.served_model_name
        self._stages = {stage: stages.labels(model, stage) for stage in STAGES}
        self._errors = Counter(
            "tca:refused_requests",
            "calls that ended with an error, by HTTP status",
            ["model_name", "status"],
            registry=self._registry,
        )
        self._registry.register(self)

    def observe(self, state: RequestState, new_tokens: int) -> None:
        """Take a change of an output; see ``manager.Observer``."""
        if new_tokens:
            now = perf_counter()
            last = self._last_token.get(state.wire_id)
            if last is None:
                self._ttft.observe(now - state.request.arrived)
            else:
                # Tokens that were told together came at the same pace.
                self._itl.observe((now - last) / new_tokens, new_tokens)
            self._last_token[state.wire_id] = now
            self._generation_tokens.inc(new_tokens)
        if state.finish is not None:
            self._last_token.pop(state.wire_id, None)
            self._observe_end(state)

    def _observe_end(self, state: RequestState) -> None:
        finish = state.finish
        assert finish is not None
        self._requests.inc()
        self._aborted.inc(finish.type == "abort")
        self._prompt_tokens.inc(state.prompt_tokens)
        self._cached_tokens.inc(state.cached_tokens)
        self._e2e.observe(state.latency)
        self._queue.observe(state.queue_seconds)
        for stage, seconds in _stage_seconds(state).items():
            self._stages[stage].observe(seconds)
        report = state.tca or {}
        if "kept_ratio" in report:
            self._kept.observe(report["kept_ratio"])
        if "dropped_mass" in report:
            self._dropped.observe(report["dropped_mass"])

    def count_refusal(self, status: int) -> None:
        """Take an error reply, or the error event of a stream; see ``errors.py``."""
        self._errors.labels(self._manager.served_model_name, status).inc()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The registry calls this when it is rendered; most are the latest heartbeat's figures."""
        yield self._itl.collect(self._manager.served_model_name)
        state = self._manager.scheduler_state
        load = load_figures(state)
        for name, (metric, text) in _GAUGES.items():
            yield self._gauge(metric, text, load[name])
        grammars = state.get("num_grammar_reqs", 0)
        yield self._gauge("sglang:num_grammar_queue_reqs", "wait for their grammar", grammars)
        for name, (metric, text) in _COUNTERS.items():
            yield self._count(metric, text, state.get(name, 0))
        for name, value in state.get("reclaimed_slots", {}).items():
            yield self._count(f"tca:{name}_slots", f"slots that were {name}", value)
        for name, value in state.get("kv_cache", {}).items():
            yield self._gauge(f"tca:kv_cache_{name}", f"kv_cache.{name} of /server_info", value)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._manager.served_model_name], value)
        return family

    def _count(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._manager.served_model_name], value)
        return family

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(name, text, ["model_name"], registry=self._registry)
        return counter.labels(self._manager.served_model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
        return histogram.labels(self._manager.served_model_name)


def _stage_seconds(state: RequestState) -> dict[str, float]:
    """Time in the phases that a request got to."""
    sent, first = state.created, state.first_token
    stages = {"tokenize": sent - state.request.arrived, "queue": state.queue_seconds}
    if first:
        stages["prefill"] = max(0.0, first - sent - state.queue_seconds)
        stages["decode"] = state.finished - first
    return stages


def scheduler_metrics(state: dict[str, Any]) -> dict[str, float]:
    """The load of ``/v1/loads`` under the names of ``/metrics``."""
    load = load_figures(state)
    return {metric: load[name] for name, (metric, _) in _GAUGES.items()}
