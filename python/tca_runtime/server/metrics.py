"""Load figures and Prometheus metrics. Names follow SGLang's; metrics have the prefix ``tca:``."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from tca_runtime.tokenizer.manager import TokenizerManager
from tca_runtime.tokenizer.state import RequestState

_PREFIX = "tca:"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def load_figures(state: dict[str, Any]) -> dict[str, Any]:
    """The scheduler's state as a router reads it; zeros before the first heartbeat."""
    capacity = state.get("max_total_num_tokens", 0)
    used = capacity - state.get("available_tokens", capacity)
    return {
        "num_running_reqs": state.get("num_running_reqs", 0),
        "num_waiting_reqs": state.get("num_waiting_reqs", 0),
        "num_waiting_uncached_tokens": state.get("num_waiting_tokens", 0),
        "num_used_tokens": used,
        "max_total_num_tokens": capacity,
        "token_usage": used / capacity if capacity else 0.0,
        "gen_throughput": state.get("gen_throughput", 0.0),
        "cache_hit_rate": state.get("cache_hit_rate", 0.0),
        "kv_cache": state.get("kv_cache", {}),
    }


class Metrics:
    """Counts what the manager reports and shows what the scheduler's heartbeats say."""

    def __init__(self, manager: TokenizerManager) -> None:
        self._registry = CollectorRegistry()
        self._manager = manager
        self._last_token: dict[str, float] = {}
        self._requests = self._counter("num_requests", "finished requests")
        self._aborted = self._counter("num_aborted_requests", "aborted requests")
        self._prompt_tokens = self._counter("prompt_tokens", "prompt tokens")
        self._cached_tokens = self._counter("cached_tokens", "prompt tokens found in the cache")
        self._generation_tokens = self._counter("generation_tokens", "generated tokens")
        self._ttft = self._histogram("time_to_first_token_seconds", "until the first token")
        self._itl = self._histogram("inter_token_latency_seconds", "between two tokens")
        self._e2e = self._histogram("e2e_request_latency_seconds", "until the end")
        self._registry.register(self)
        manager.observer = self.observe

    def observe(self, state: RequestState, new_tokens: int) -> None:
        """Take a change of an output; see ``manager.Observer``."""
        if new_tokens:
            now = perf_counter()
            last = self._last_token.get(state.wire_id)
            if last is None:
                self._ttft.observe(now - state.request.arrived)
            else:
                self._itl.observe((now - last) / new_tokens)
            self._last_token[state.wire_id] = now
            self._generation_tokens.inc(new_tokens)
        if state.finish is not None:
            self._last_token.pop(state.wire_id, None)
            self._requests.inc()
            self._aborted.inc(state.finish.type == "abort")
            self._prompt_tokens.inc(state.prompt_tokens)
            self._cached_tokens.inc(state.cached_tokens)
            self._e2e.observe(state.latency)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Gauges of the latest heartbeat; the registry calls this when it is rendered."""
        load = load_figures(self._manager.scheduler_state)
        slots = load.pop("kv_cache")
        load["num_queue_reqs"] = load.pop("num_waiting_reqs")
        for name, value in load.items():
            yield self._gauge(name, f"{name} of /v1/loads", value)
        for name, value in slots.items():
            yield self._gauge(f"kv_cache_{name}", f"kv_cache.{name} of /server_info", value)

    def _gauge(self, name: str, description: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(_PREFIX + name, description, labels=["model_name"])
        family.add_metric([self._manager.served_model_name], value)
        return family

    def _counter(self, name: str, description: str) -> Counter:
        counter = Counter(_PREFIX + name, description, ["model_name"], registry=self._registry)
        return counter.labels(self._manager.served_model_name)

    def _histogram(self, name: str, description: str) -> Histogram:
        histogram = Histogram(
            _PREFIX + name,
            description,
            ["model_name"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        return histogram.labels(self._manager.served_model_name)
