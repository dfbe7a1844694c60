"""What one tenant sent is never seen, or felt, by another."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.fakes import Harness, expected_output

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
