"""How busy the server is, in the shapes that routers read."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.manager import TokenizerManager

# What ``include`` may name. A text model on one device has nothing to say about some of them.
SECTIONS = frozenset({"core", "memory", "spec", "lora", "disagg", "queues", "all"})


def load_figures(state: dict[str, Any]) -> dict[str, Any]:
    """The core figures of ``/v1/loads``; zeros before the first heartbeat."""
    capacity = state.get("max_total_num_tokens", 0)
    used = capacity - state.get("available_tokens", capacity)
    running = state.get("num_running_reqs", 0)
    slots = state.get("max_running_requests", 0)
    waiting_tokens = state.get("num_waiting_uncached_tokens", 0)
    return {
        "num_running_reqs": running,
        "num_waiting_reqs": state.get("num_waiting_reqs", 0),
        "num_waiting_uncached_tokens": waiting_tokens,
        "num_used_tokens": used,
        "num_total_tokens": used + waiting_tokens,
        "num_active_tokens": used + waiting_tokens,
        "max_total_num_tokens": capacity,
        "max_running_requests": slots,
        "token_usage": used / capacity if capacity else 0.0,
        "gen_throughput": state.get("gen_throughput", 0.0),
        "cache_hit_rate": state.get("cache_hit_rate", 0.0),
        "utilization": running / slots if slots else 0.0,
    }


def router_load(state: dict[str, Any]) -> list[dict[str, Any]]:
    """``/get_load``, as routers of the SGLang project sum it up."""
    load = load_figures(state)
    waiting = load["num_waiting_reqs"]
    return [
        {
            "dp_rank": 0,
            "num_reqs": load["num_running_reqs"] + waiting,
            "num_waiting_reqs": waiting,
            "num_tokens": load["num_total_tokens"],
        }
    ]


def loads_report(
    manager: TokenizerManager, include: str | None, dp_rank: int | None
) -> dict[str, Any]:
    """``/v1/loads``.

    Raises
    ------
    RequestError
        If ``include`` names an unknown section.
    """
    wanted = set((include or "all").split(","))
    if wanted - SECTIONS:
        raise RequestError(
            f"include must name some of {', '.join(sorted(SECTIONS))}; got {include!r}",
            param="include",
        )
    now = datetime.now(UTC).isoformat()
    state = manager.scheduler_state
    load: dict[str, Any] = {"timestamp": now, "dp_rank": 0, **load_figures(state)}
    if wanted & {"memory", "all"}:
        load["memory"] = {
            "kv_cache_gb": manager.info.get("kv_cache_gb", 0.0),
            "token_capacity": load["max_total_num_tokens"],
        }
    if wanted & {"queues", "all"}:
        grammar = state.get("num_grammar_reqs", 0)
        load["queues"] = {
            "waiting": load["num_waiting_reqs"] - grammar,
            "grammar": grammar,
            "paused": 0,
            "retracted": state.get("num_retracted_reqs", 0),
        }
    load["kv_cache"] = state.get("kv_cache", {})
    return {
        "timestamp": now,
        "version": version("tca-runtime"),
        "accelerator": manager.info.get("device"),
        "num_accelerators": 1,
        "loads": [load] if dp_rank in (None, 0) else [],
    }
