"""Requests through the scheduler, on a fake model that reads its context from the cache."""

from __future__ import annotations

import traceback
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca_runtime.engine.grammar import GrammarError
from tca_runtime.messages import AbortRequest, Control, ControlReply, LogprobOptions
from tests.scheduler.fakes import EOS, ROWS, CountingMatcher, Harness, expected_output


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, list[int], int, int | None]]:
    """(arrival step, prompt, max_new_tokens, abort step)."""
    prompt = st.lists(st.integers(1, 3), min_size=1, max_size=20)
    return draw(
        st.lists(
            st.tuples(
                st.integers(0, 20),
                prompt,
                st.integers(0, 30),
                st.none() | st.integers(0, 60),
            ),
            min_size=1,
            max_size=8,
        )
    )


@settings(max_examples=40, deadline=None)
@given(
    workload=workloads(),
    capacity=st.integers(51, 90),
    chunk=st.sampled_from([1, 3, 16, 64]),
    mixed=st.booleans(),
    policy=st.sampled_from(["lpm", "fcfs"]),
)
def test_every_request_is_answered_once_and_right(
    workload: list[tuple[int, list[int], int, int | None]],
    capacity: int,
    chunk: int,
    mixed: bool,
    policy: str,
) -> None:
    harness = Harness(
        capacity, chunked_prefill_size=chunk, mixed_batches=mixed, schedule_policy=policy
    )
    for step in range(61):
        for i, (arrival, prompt, max_new, abort) in enumerate(workload):
            if arrival == step:
                harness.submit(f"r{i}", prompt, max_new)
            if abort == step:
                harness.mail.inbound.append(AbortRequest(rid=f"r{i}"))
        harness.scheduler.run_once()
        harness.engine.cache.check()
    harness.run(2000)
    for i, (_, prompt, max_new, abort) in enumerate(workload):
        finish = harness.finish(f"r{i}")
        expected = expected_output(prompt, max_new)
        got = harness.tokens(f"r{i}")
        if finish.type == "abort":
            assert abort is not None
            assert got == expected[: len(got)]
        else:
            assert got == expected
            assert finish.type == ("stop" if got and got[-1] == EOS else "length")
    assert harness.engine.cache.usage().running_slots == 0


def test_prefix_is_reused_and_reported() -> None:
    harness = Harness()
    harness.submit("a", [1, 2, 3, 4, 5, 6])
    harness.run()
    harness.submit("b", [1, 2, 3, 4, 9])
    harness.run()
    assert harness.outputs("a")[-1].cached_tokens == 0
    assert harness.outputs("b")[-1].cached_tokens == 4
    harness.submit("c", [1, 2, 3, 4, 9], extra_key="other")
    harness.run()
    assert harness.outputs("c")[-1].cached_tokens == 0


def test_same_prompts_at_once_compute_the_prefix_once() -> None:
    prompt = [1 + i % 7 for i in range(150)]
    harness = Harness(capacity_tokens=400)
    for i in range(4):
        harness.submit(f"r{i}", [*prompt, 10 + i])
    harness.run()
    computed = sum(len(c.tokens) for step in harness.engine.steps for c in step.chunks)
    assert computed <= len(prompt) + 4
    assert sorted(harness.outputs(f"r{i}")[-1].cached_tokens for i in range(4))[1] == len(prompt)


def test_retraction_resumes_where_it_stopped() -> None:
    prompts = [p for p in ([i] * 10 for i in range(1, 97)) if len(expected_output(p, 90)) == 90]
    harness = Harness(capacity_tokens=110)
    for i in range(3):
        harness.submit(f"r{i}", prompts[i], 90)
    harness.run(1000)
    assert harness.scheduler.planner.num_retractions > 0
    for i in range(3):
        assert harness.tokens(f"r{i}") == expected_output(prompts[i], 90)


def test_prompt_longer_than_context_or_cache_is_refused_with_numbers() -> None:
    harness = Harness(capacity_tokens=30, context=20)
    harness.submit("a", list(range(1, 26)))
    harness.run()
    finish = harness.finish("a")
    assert (finish.type, finish.status) == ("abort", 400)
    assert "25 tokens" in finish.message and "20" in finish.message
    harness.submit("b", list(range(1, 18)), max_new_tokens=100)
    harness.run()
    assert len(harness.tokens("b")) <= 3


def test_queue_limit_answers_503() -> None:
    harness = Harness(max_queued_requests=2)
    for i in range(4):
        harness.submit(f"r{i}", [1, 2])
    harness.run()
    assert [harness.finish(f"r{i}").status for i in range(4)] == [0, 0, 503, 503]


@pytest.mark.parametrize("start", [0, 1, 3, 6])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("chunk", [2, 64])
def test_prompt_logprobs_align_with_start(start: int, warm: bool, chunk: int) -> None:
    prompt = [5, 6, 7, 8, 9, 4]
    harness = Harness(chunked_prefill_size=chunk)
    if warm:
        harness.submit("warm", prompt)
        harness.run()
    harness.submit("a", prompt, max_new_tokens=0, logprobs=LogprobOptions(start))
    harness.run()
    entries = harness.outputs("a")[-1].input_logprobs
    assert entries is not None
    assert [token for _, token in entries] == prompt[start:]
    assert [value is None for value, _ in entries] == [
        position == 0 for position in range(start, len(prompt))
    ]


def test_zero_new_tokens_fill_the_cache() -> None:
    harness = Harness()
    harness.submit("a", [1, 2, 3], max_new_tokens=0)
    harness.run()
    assert harness.finish("a").type == "length"
    assert harness.engine.cache.usage().tree_slots == 3 * ROWS
    harness.submit("b", [1, 2, 3], max_new_tokens=0)
    harness.run()
    assert harness.outputs("b")[-1].cached_tokens == 3


def test_flush_is_refused_while_requests_run() -> None:
    harness = Harness()
    harness.submit("a", [1, 2, 3], max_new_tokens=30)
    harness.scheduler.run_once()
    harness.mail.inbound.append(Control(call_id="x", action="flush_cache"))
    harness.run()
    harness.mail.inbound.append(Control(call_id="y", action="flush_cache"))
    harness.scheduler.run_once()
    replies = [m for m in harness.mail.outbound if isinstance(m, ControlReply)]
    assert [(r.call_id, r.ok) for r in replies] == [("x", False), ("y", True)]
    assert harness.engine.cache.usage().tree_slots == 0


def test_long_prompt_does_not_stop_running_streams() -> None:
    harness = Harness(capacity_tokens=300, chunked_prefill_size=8)
    harness.submit("stream", [1, 2], max_new_tokens=12)
    harness.scheduler.run_once()
    harness.submit("long", [3] * 80, max_new_tokens=1)
    expected = len(expected_output([1, 2], 12))
    for _ in range(expected):
        harness.scheduler.run_once()
    assert len(harness.tokens("stream")) == expected
    harness.run()
    assert harness.tokens("long") == expected_output([3] * 80, 1)


def test_a_request_waits_for_its_grammar() -> None:
    """Also when compiling ends after this step's look at it."""
    harness = Harness()
    future: Future[Any] = Future()
    harness.submit("a", [1, 2, 3])
    harness.scheduler.run_once()
    harness.submit("b", [4, 5, 6])
    harness.scheduler._handle(harness.mail.inbound.pop())
    (request,) = harness.scheduler.planner.waiting
    request.grammar = future
    harness.scheduler._end_finished()
    future.set_result(SimpleNamespace(matcher=lambda: matcher))
    matcher = CountingMatcher(100)
    assert all(c.request is not request for c in harness.scheduler.planner.plan().chunks)
    harness.scheduler._end_finished()
    assert request.sampling.matcher is matcher
    harness.run()
    assert harness.tokens("b") == expected_output([4, 5, 6], 5)


def test_grammars_are_released_once_done_or_no_longer_waited_for() -> None:
    harness = Harness()
    future: Future[Any] = Future()
    harness.grammars.given = future
    for rid in ("a", "b"):
        harness.submit(rid, [1, 2, 3], grammar=4)
    harness.scheduler.run_once()
    assert len(harness.grammars.held) == 2
    harness.mail.inbound.append(AbortRequest(rid="a"))
    harness.scheduler.run_once()
    assert harness.finish("a").status == 499
    assert len(harness.grammars.held) == 1
    future.set_result(SimpleNamespace(matcher=lambda: CountingMatcher(4)))
    harness.run()
    assert len(harness.tokens("b")) == 4
    assert not harness.grammars.held


def test_a_broken_grammar_is_its_clients_mistake() -> None:
    harness = Harness()
    future: Future[Any] = Future()
    future.set_exception(GrammarError("no such thing"))
    harness.submit("a", [1, 2, 3])
    harness.scheduler._handle(harness.mail.inbound.pop())
    (request,) = harness.scheduler.planner.waiting
    request.grammar = future
    harness.run()
    finish = harness.finish("a")
    assert (finish.type, finish.status, finish.message) == ("abort", 400, "no such thing")


def test_requests_of_one_broken_grammar_leave_nothing_in_its_error() -> None:
    harness = Harness()
    try:
        raise GrammarError("no such thing")
    except GrammarError as error:
        broken = error
    harness.grammars.given = Future()
    harness.grammars.given.set_exception(broken)
    frames = len(list(traceback.walk_tb(broken.__traceback__)))
    for i in range(50):
        harness.submit(f"r{i}", [1, 2, 3], grammar=4)
        harness.run()
        assert harness.finish(f"r{i}").status == 400
    assert len(list(traceback.walk_tb(broken.__traceback__))) == frames


def test_a_grammar_that_fails_in_another_way_ends_its_request_only() -> None:
    harness = Harness()
    harness.grammars.given = Future()
    harness.grammars.given.set_exception(MemoryError("out of memory"))
    harness.submit("a", [1, 2, 3], grammar=4)
    harness.submit("b", [1, 2, 3])
    harness.run()
    assert harness.finish("a").status == 500
    assert harness.tokens("b") == expected_output([1, 2, 3], 5)


def test_fast_tokens_share_messages_and_none_is_lost() -> None:
    harness = Harness()
    harness.scheduler.stream_interval = 3600.0
    harness.submit("a", [4, 5, 6], 30)
    harness.run()
    expected = expected_output([4, 5, 6], 30)
    assert harness.tokens("a") == expected
    assert [len(o.token_ids) for o in harness.outputs("a")] == [1, len(expected) - 1]


def test_whole_replies_are_told_once_begun_and_once_done() -> None:
    harness = Harness()
    harness.submit("whole", [1, 2, 3], max_new_tokens=9, incremental=False)
    harness.submit("stream", [2, 2, 3], max_new_tokens=9)
    harness.run()
    assert [len(o.token_ids) for o in harness.outputs("whole")] == [1, 8]
    assert [len(o.token_ids) for o in harness.outputs("stream")] == [1] * 9
    assert harness.tokens("whole") == expected_output([1, 2, 3], 9)


def test_a_refused_queue_is_looked_at_again_only_when_something_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness = Harness(capacity_tokens=130)
    running = next([i] * 10 for i in range(1, 97) if len(expected_output([i] * 10, 60)) == 60)
    harness.submit("running", running, 60)
    harness.scheduler.run_once()
    for i in range(3):
        harness.submit(f"r{i}", [90 + i] * 80, 3)
    lookups: list[int] = []
    match = harness.engine.cache.match
    monkeypatch.setattr(harness.engine.cache, "match", lambda *a: lookups.append(1) or match(*a))
    harness.scheduler.run_once()
    assert lookups
    lookups.clear()
    for _ in range(20):
        harness.scheduler.run_once()
    assert len(harness.tokens("running")) == 22 and not lookups
    harness.run()
    for i in range(3):
        assert harness.tokens(f"r{i}") == expected_output([90 + i] * 80, 3)
