"""What one tenant sent is never seen, or felt, by another."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.fakes import Harness, expected_output
from tests.scheduler.tiny_server import Server
from tests.scheduler.tiny_server import prompt as random_prompt

TENANTS = [None, "a", "b"]


def shared(one: Sequence[int], two: Sequence[int]) -> int:
    count = 0
    while count < min(len(one), len(two)) and one[count] == two[count]:
        count += 1
    return count


@settings(max_examples=40, deadline=None)
@given(
    traffic=st.lists(
        st.tuples(
            st.sampled_from(TENANTS),
            st.lists(st.integers(1, 2), min_size=1, max_size=30),
            st.booleans(),
        ),
        min_size=2,
        max_size=12,
    )
)
def test_cached_tokens_come_from_the_tenants_own_requests(
    traffic: list[tuple[str | None, list[int], bool]],
) -> None:
    harness = Harness(capacity_tokens=120)
    for i, (tenant, prompt, alone) in enumerate(traffic):
        harness.submit(f"r{i}", prompt, 8, extra_key=tenant)
        if alone:
            harness.run()
    harness.run()
    for i, (tenant, prompt, _) in enumerate(traffic):
        own = [
            p + expected_output(p, 8)
            for j, (other, p, _) in enumerate(traffic)
            if other == tenant and j != i
        ]
        most = max((shared(text, prompt) for text in own), default=0)
        assert harness.outputs(f"r{i}")[-1].cached_tokens <= most
        assert harness.tokens(f"r{i}") == expected_output(prompt, 8)


def test_a_tenant_does_not_wait_for_anothers_prefix() -> None:
    """Who waits for a prefix in prefill would learn that somebody else is computing it."""
    prompt = [1 + i % 7 for i in range(200)]
    harness = Harness(capacity_tokens=900, chunked_prefill_size=256)
    harness.submit("first", prompt, 2, extra_key="a")
    harness.submit("same", prompt, 2, extra_key="a")
    harness.submit("other", prompt, 2, extra_key="b")
    harness.scheduler.run_once()
    assert [r.rid for r in harness.scheduler.planner.waiting] == ["same"]
    harness.run()
    assert harness.outputs("other")[-1].cached_tokens == 0
    assert harness.outputs("same")[-1].cached_tokens == len(prompt) - 1


@pytest.mark.parametrize("retention", ["immediate", "on-pressure", "never"])
def test_a_limit_on_the_dropped_mass_drops_nothing_of_other_requests(retention: str) -> None:
    """With a limit of 1 the view has 5 % of the prompt, and "immediate" drops all the rest."""
    document = random_prompt(1, 1500)
    question, other = random_prompt(2, 40), random_prompt(3, 40)
    expected = Server(tca_retention=retention).ask(document + question)
    server = Server(tca_retention=retention)
    server.ask(document + other, max_dropped_mass=1.0)
    server.submit("plain", document + question)
    server.submit("same", document + question, max_dropped_mass=1.0)
    server.run()
    cached = {rid: server.last(rid).cached_tokens for rid in ("plain", "same")}
    assert cached == {"plain": 0 if retention == "immediate" else 1500, "same": 1500}
    if retention == "immediate":
        assert server.tokens("plain") == expected
        assert server.engine.cache.reclaimer.counts.pruned > 0
