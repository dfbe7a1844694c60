"""Two servers behind the unmodified router, one of which is killed."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import pytest
import requests

from benchmark.cluster import (
    TINY,
    Cluster,
    conversations,
    converse_and_kill,
    running_cluster,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("sglang_router") is None,
        reason="needs sglang-router: pip install --no-deps -r requirements-clients.txt",
    ),
]


def ask(cluster: Cluster, **fields: Any) -> requests.Response:
    params = {"max_new_tokens": 4, "temperature": 0, **fields.pop("params", {})}
    body = {"text": "hello", "sampling_params": params, **fields}
    return requests.post(cluster.url + "/generate", json=body, timeout=60)


def test_whole_replies_survive_a_killed_replica() -> None:
    with running_cluster(TINY) as cluster:
        _check_fields(cluster)
        _check_client_errors_close_no_worker(cluster)
        phase = asyncio.run(
            converse_and_kill(cluster, conversations(16, 0), cluster.replicas[0], stream=False)
        )
        assert phase.errors == []
        assert phase.turns == 48
        assert phase.retries >= phase.in_flight > 0
        assert phase.cached_tokens > 0
        # New requests find the survivor, and the router knows that it is alone.
        assert ask(cluster).status_code == 200
        assert requests.get(cluster.url + "/health", timeout=10).status_code == 200


def test_only_streams_on_the_killed_replica_break() -> None:
    with running_cluster(TINY) as cluster:
        phase = asyncio.run(
            converse_and_kill(cluster, conversations(16, 1), cluster.replicas[1], stream=True)
        )
        assert len(phase.errors) <= phase.in_flight
        assert ask(cluster, stream=True).text.rstrip().endswith("data: [DONE]")


def _check_fields(cluster: Cluster) -> None:
    """Fields that the router passes on do their work; what it drops does no harm."""
    reply = ask(cluster, rid="mine", return_logprob=True, logprob_start_len=0).json()
    assert reply["meta_info"]["id"] == "mine"
    assert len(reply["meta_info"]["output_token_logprobs"]) == 4
    prefix = {"text": "the same long prefix " * 10}
    for key, cached in (("a", 0), ("a", 100), ("b", 0)):
        meta = ask(cluster, extra_key=key, **prefix).json()["meta_info"]
        assert meta["cached_tokens"] >= cached and bool(meta["cached_tokens"]) == bool(cached)
    params = {"custom_params": {"kept_ratio": 0.5}, "regex": "[ab]+"}
    reply = ask(cluster, params=params).json()
    assert set(reply["text"]) <= {"a", "b"}


def _check_client_errors_close_no_worker(cluster: Cluster) -> None:
    """Its circuit breaker would shut a worker out after ten of them."""
    for _ in range(30):
        assert ask(cluster, params={"temperature": -1}).status_code == 400
    assert ask(cluster).status_code == 200
