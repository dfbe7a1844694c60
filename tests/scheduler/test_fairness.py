"""Shares between clients, priorities, and deadlines."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca_runtime.messages import AbortRequest, FinishReason, GenerateRequest
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler import deadlines
from tca_runtime.scheduler.fairness import OUTPUT_WEIGHT, PREPAID_OUTPUT, QUANTUM
from tca_runtime.scheduler.request import Request, token_buffer
from tca_runtime.scheduler.waiting import RANKED, WaitingQueue
from tests.scheduler.fakes import Harness


class NoCache:
    """Nothing is ever cached."""

    def match(self, namespace: object, tokens: object) -> Any:
        class Match:
            num_tokens = 0

        return Match()


CACHE: Any = NoCache()


def request(arrival: int, client: str, prompt: int, output: int = 0, priority: int = 0) -> Request:
    tokens = np.ones(prompt, dtype=np.int32)
    message = GenerateRequest(
        rid=f"r{arrival}",
        input_ids=b"",
        sampling=SamplingParams(max_new_tokens=output),
        priority=priority,
        client=client,
    )
    sampling: Any = None
    return Request(
        message=message,
        arrival=arrival,
        max_new_tokens=output,
        sampling=sampling,
        tokens=token_buffer(tokens, output),
        num_prompt=prompt,
        num_tokens=prompt,
    )


def admit(queue: WaitingQueue) -> Request:
    """Admit the first candidate, as the planner does."""
    chosen = queue.ranked(CACHE)[0]
    queue.admit(chosen, chosen.num_tokens)
    queue.remove({chosen})
    return chosen


def cost(r: Request) -> int:
    return r.num_prompt + OUTPUT_WEIGHT * min(r.max_new_tokens, PREPAID_OUTPUT)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 6000), st.integers(0, 400)),
        min_size=3,
        max_size=60,
    ),
    policy=st.sampled_from(["lpm", "fcfs"]),
)
def test_service_of_waiting_clients_differs_by_a_quantum_and_one_request(
    sizes: list[tuple[str, int, int]], policy: str
) -> None:
    queue = WaitingQueue(policy)
    for arrival, (client, prompt, output) in enumerate(sizes):
        queue.add(request(arrival, client, prompt, output))
    left = Counter(client for client, _, _ in sizes)
    served: Counter[str] = Counter()
    largest = max(cost(r) for r in queue)
    while left:
        chosen = admit(queue)
        served[chosen.client] += cost(chosen)
        left[chosen.client] -= 1
        left += Counter()
        backlogged = [served[client] for client in left]
        if len(backlogged) > 1:
            assert max(backlogged) - min(backlogged) < QUANTUM + largest


def test_a_flood_does_not_hide_a_late_client() -> None:
    queue = WaitingQueue("fcfs")
    for arrival in range(3 * RANKED):
        queue.add(request(arrival, "flood", 5000))
    queue.add(request(3 * RANKED, "late", 5000))
    assert "late" in [admit(queue).client for _ in range(2)]


def test_new_names_do_not_starve_a_client() -> None:
    queue = WaitingQueue("fcfs")
    for arrival in range(50):
        queue.add(request(arrival, "honest", 5000))
    clients = []
    for arrival in range(50, 90):
        queue.add(request(arrival, f"name-{arrival}", 5000))
        clients.append(admit(queue).client)
    # Each admission of the honest one leaves one more name waiting: its share is a harmonic sum.
    assert clients.count("honest") >= 4
    assert "honest" in clients[-15:]


def test_priority_comes_first_and_shares_hold_within_it() -> None:
    queue = WaitingQueue("fcfs")
    for arrival in range(2 * RANKED):
        queue.add(request(arrival, "a", 5000))
    for arrival in range(4):
        queue.add(request(1000 + arrival, "a", 5000, priority=1))
    for arrival in range(2):
        queue.add(request(2000 + arrival, "b", 5000, priority=1))
    first = [admit(queue) for _ in range(7)]
    assert [r.message.priority for r in first] == [1] * 6 + [0]
    assert {r.client for r in first[:2]} == {"a", "b"}
    assert {r.client for r in first[2:4]} == {"a", "b"}


def test_unused_output_is_refunded() -> None:
    queue = WaitingQueue("fcfs")
    for arrival in range(60):
        queue.add(request(arrival, "prompt", 10 + OUTPUT_WEIGHT * PREPAID_OUTPUT))
        queue.add(request(arrival + 60, "short", 10, PREPAID_OUTPUT))
    served: Counter[str] = Counter()
    for _ in range(60):
        chosen = admit(queue)
        served[chosen.client] += 1
        chosen.finish = FinishReason("stop")
        queue.remove({chosen})
    # Both seem to cost the same, but the short ones end without any output: they are cheap.
    assert served["short"] > 45


def test_a_refund_from_before_an_empty_queue_earns_nothing() -> None:
    queue = WaitingQueue("fcfs")
    old = [request(arrival, "a", 10, PREPAID_OUTPUT) for arrival in range(40)]
    for r in old:
        queue.add(r)
    while len(queue):
        admit(queue)
    for arrival in range(40, 80):
        queue.add(request(arrival, "a", 2000))
        queue.add(request(arrival + 100, "b", 2000))
    for r in old:
        r.finish = FinishReason("stop")
    queue.remove(set(old))
    assert "b" in {admit(queue).client for _ in range(4)}


def test_one_client_leaves_the_policy_alone() -> None:
    queue = WaitingQueue("fcfs")
    for arrival in range(20):
        queue.add(request(arrival, "", 9000))
    assert [admit(queue).arrival for _ in range(20)] == list(range(20))


def waiting_clients(harness: Harness) -> list[str]:
    return sorted(r.client for r in harness.scheduler.planner.waiting if r.finish is None)


def test_a_flood_does_not_shut_others_out() -> None:
    harness = Harness(max_running_requests=1, max_queued_requests=4)
    harness.submit("busy", [9] * 5, 60)
    harness.scheduler.run_once()
    for i in range(6):
        harness.submit(f"flood{i}", [1] * 5, 1, client="flood")
    harness.scheduler.run_once()
    assert waiting_clients(harness) == ["flood"] * 4
    for i in range(4):
        harness.submit(f"b{i}", [2] * 5, 1, client="b")
    harness.scheduler.run_once()
    assert waiting_clients(harness) == ["b", "b", "flood", "flood"]
    harness.submit("c", [3] * 5, 1, client="c")
    harness.scheduler.run_once()
    assert "c" in waiting_clients(harness)
    harness.run()
    statuses = Counter(harness.finish(f"flood{i}").status for i in range(6))
    assert statuses[503] >= 4
    assert harness.finish("flood0").type != "abort"
    assert harness.finish("c").type != "abort"
    assert harness.finish("busy").type != "abort"


def test_an_abort_does_not_change_why_a_request_has_ended() -> None:
    harness = Harness(max_running_requests=1, max_queued_requests=1)
    harness.submit("busy", [9] * 5, 60)
    harness.scheduler.run_once()
    harness.submit("low", [1] * 5, 1)
    harness.submit("high", [2] * 5, 1, priority=1)
    harness.mail.inbound += [AbortRequest(rid="low"), AbortRequest(rid="busy")]
    harness.run()
    assert harness.finish("low").status == 503
    assert harness.finish("busy").status == 499
    assert harness.finish("high").type != "abort"


def test_a_full_queue_keeps_the_higher_priorities() -> None:
    harness = Harness(max_running_requests=1, max_queued_requests=2)
    harness.submit("busy", [9] * 5, 60)
    harness.scheduler.run_once()
    for name, priority in (("low", 0), ("middle", 1), ("high", 2), ("lowest", -1), ("also", 0)):
        harness.submit(name, [1] * 5, 1, priority=priority)
    harness.run()
    refused = {n for n in ("low", "middle", "high", "lowest", "also") if harness.finish(n).status}
    assert refused == {"low", "lowest", "also"}


@pytest.mark.parametrize(
    ("limits", "status", "words"),
    [
        ({"queue_timeout": 30.0}, 503, "--queue-timeout"),
        ({"request_timeout": 30.0}, 504, "--request-timeout"),
    ],
)
def test_a_request_over_its_time_gets_one_clean_end(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, float], status: int, words: str
) -> None:
    monkeypatch.setattr(deadlines, "CHECK_SECONDS", 0.0)
    harness = Harness(max_running_requests=1, **limits)
    harness.submit("running", [1] * 10, 60)
    harness.submit("waiting", [2] * 10, 5)
    for _ in range(4):
        harness.scheduler.run_once()
    for open_request in harness.scheduler.planner.active():
        open_request.arrived_at -= 31.0
    harness.run()
    assert harness.finish("waiting").status == status
    assert words in harness.finish("waiting").message
    ended_early = harness.finish("running").type == "abort"
    assert ended_early == ("request_timeout" in limits)
    assert harness.engine.cache.usage().running_slots == 0
