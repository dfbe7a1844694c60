"""Two steps at once: the same answers as one at a time, and no slot changes hands too early."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca_runtime.attention.cpu_backend import CpuBackend
from tca_runtime.messages import (
    AbortRequest,
    Control,
    ControlReply,
    FinishReason,
    LogprobOptions,
)
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.layered_prefill import LayeredPrefill
from tca_runtime.scheduler.pace import PrefillPace
from tca_runtime.scheduler.planner import StepPlan, StepPlanner
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.policies import create_policy
from tca_runtime.sparsity.settings import SparsitySettings
from tests.scheduler.fakes import EOS, HEADS, LAYERS, ROWS, VOCAB, Harness, expected_output
from tests.scheduler.tiny_server import Server, prompt


class Work(NamedTuple):
    """One request of a workload; ``abort`` is the iteration of its abort."""

    arrival: int
    prompt: list[int]
    max_new: int
    abort: int | None
    grammar: int | None


work = st.builds(
    Work,
    arrival=st.integers(0, 20),
    prompt=st.lists(st.integers(1, 3), min_size=1, max_size=20),
    max_new=st.integers(0, 30),
    abort=st.none() | st.integers(0, 60),
    grammar=st.none() | st.none() | st.integers(1, 8),
)


def serve(workload: list[Work], is_asynchronous: bool, **args: Any) -> Harness:
    harness = Harness(is_asynchronous=is_asynchronous, **args)
    for step in range(61):
        for i, request in enumerate(workload):
            if request.arrival == step:
                harness.submit(f"r{i}", request.prompt, request.max_new, grammar=request.grammar)
            if request.abort == step:
                harness.mail.inbound.append(AbortRequest(rid=f"r{i}"))
        harness.scheduler.run_once()
        harness.engine.cache.check()
    harness.run(2000)
    return harness


@settings(max_examples=60, deadline=None)
@given(
    workload=st.lists(work, min_size=1, max_size=8),
    capacity=st.integers(51, 90) | st.just(400),
    chunk=st.sampled_from([1, 3, 16, 64]),
    mixed=st.booleans(),
)
def test_overlap_changes_no_answer(
    workload: list[Work], capacity: int, chunk: int, mixed: bool
) -> None:
    args = {"capacity_tokens": capacity, "chunked_prefill_size": chunk, "mixed_batches": mixed}
    one, two = (serve(workload, overlap, **args) for overlap in (False, True))
    assert one.engine.deepest <= 1 and two.engine.deepest <= 2
    for i, request in enumerate(workload):
        rid, expected = f"r{i}", expected_output(request.prompt, request.max_new)
        finish, tokens = two.finish(rid), two.tokens(rid)
        if finish.type == "abort":
            assert request.abort is not None
            assert tokens == expected[: len(tokens)]
        elif one.finish(rid).type != "abort":
            assert (tokens, finish) == (one.tokens(rid), one.finish(rid))
        if request.grammar is None and finish.type != "abort":
            assert tokens == expected
    usage = two.engine.cache.usage()
    assert usage.running_slots == 0
    if capacity == 400 and not any(r.abort is not None for r in workload):
        assert usage == one.engine.cache.usage()


long_work = st.builds(
    Work,
    arrival=st.integers(0, 30),
    prompt=st.lists(st.integers(1, 3), min_size=1, max_size=60),
    max_new=st.integers(0, 40),
    abort=st.none() | st.integers(0, 60),
    grammar=st.none() | st.none() | st.integers(1, 8),
)


@settings(max_examples=60, deadline=None)
@given(
    workload=st.lists(long_work, min_size=2, max_size=8),
    capacity=st.integers(110, 200) | st.just(800),
    overlap=st.booleans(),
    mixed=st.booleans(),
    tail=st.sampled_from([0, 8]),
)
def test_chunks_computed_layer_by_layer_change_no_answer(
    workload: list[Work], capacity: int, overlap: bool, mixed: bool, tail: int
) -> None:
    table = BudgetTable.uniform(0.5, LAYERS, HEADS, block=4)
    selecting = SparsitySettings(
        create_policy("tca"),
        table,
        table,
        window=4,
        min_candidates=4,
        probes=4,
        granularity=16,
        first_refresh=1024,
        tail=tail,
    )
    args = {"capacity_tokens": capacity, "chunked_prefill_size": 64, "mixed_batches": mixed}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefillPace, "budget", lambda self, decoding, prompts: 4 if decoding else 64)
        harness = serve(workload, overlap, sparsity=selecting, **args)
    for i, request in enumerate(workload):
        finish, tokens = harness.finish(f"r{i}"), harness.tokens(f"r{i}")
        expected = expected_output(request.prompt, request.max_new)
        if request.grammar is None:
            cut = len(tokens) if finish.type == "abort" else len(expected)
            assert tokens == expected[:cut]
        assert finish.type != "abort" or request.abort is not None
    assert harness.engine.cache.usage().running_slots == 0


def long_prompts(length: int) -> list[list[int]]:
    """Prompts that do not draw the end token within ``length`` tokens."""
    candidates = ([i] * 10 for i in range(1, VOCAB))
    return [p for p in candidates if len(expected_output(p, length)) == length]


def test_the_next_step_is_launched_before_the_last_one_is_read() -> None:
    harness = Harness(is_asynchronous=True)
    harness.submit("a", long_prompts(12)[0], 12)
    harness.scheduler.run_once()
    assert harness.outputs("a") == []
    for read in range(1, 12):
        harness.scheduler.run_once()
        assert len(harness.tokens("a")) == read
        assert len(harness.engine.steps) == read + 1
    harness.run()
    assert harness.engine.deepest == 2


def test_a_length_limit_costs_no_step() -> None:
    harness = Harness(is_asynchronous=True)
    prompts = long_prompts(9)
    for i, length in enumerate((1, 2, 9)):
        harness.submit(f"r{i}", prompts[i], length)
    harness.run()
    assert sum(len(step.decode) for step in harness.engine.steps) == 0 + 1 + 8
    assert [len(harness.tokens(f"r{i}")) for i in range(3)] == [1, 2, 9]


def ending_prompt() -> list[int]:
    """A prompt whose output ends with the end token, some way in."""
    return next(
        p for p in ([i, i] for i in range(1, VOCAB)) if 3 < len(expected_output(p, 60)) < 60
    )


def test_what_is_drawn_after_the_end_is_dropped_and_not_cached() -> None:
    text = ending_prompt()
    expected = expected_output(text, 60)
    harness = Harness(is_asynchronous=True)
    harness.submit("a", text, 60)
    harness.run()
    assert harness.tokens("a") == expected and expected[-1] == EOS
    assert sum(len(step.decode) for step in harness.engine.steps) == len(expected)
    assert harness.engine.cache.usage().tree_slots == (len(text) + len(expected) - 1) * ROWS
    assert harness.scheduler.state()["generation_tokens_total"] == len(expected)


def test_an_abort_is_answered_at_once_and_releases_when_the_step_has_ended() -> None:
    harness = Harness(is_asynchronous=True, capacity_tokens=200)
    texts = long_prompts(30)
    harness.submit("a", texts[0], 30)
    harness.submit("b", texts[1], 30)
    for _ in range(5):
        harness.scheduler.run_once()
    planner = harness.scheduler.planner
    sequence = planner.running[0].sequence
    harness.mail.inbound.append(AbortRequest(rid="a"))
    for message in harness.scheduler._inbox.drain():
        harness.scheduler._handle(message)
    harness.scheduler._end_finished()
    assert harness.finish("a").type == "abort"
    [leaving] = planner.leaving
    assert leaving.sequence is sequence is not None
    seen = len(harness.tokens("a"))
    harness.scheduler.run_once()
    assert leaving.sequence is None and not planner.leaving
    harness.run()
    assert len(harness.tokens("a")) == seen
    assert harness.tokens("b") == expected_output(texts[1], 30)


def test_nothing_in_flight_is_retracted() -> None:
    """The fake device would find slots that were freed under a running step."""
    prompts = long_prompts(90)
    harness = Harness(capacity_tokens=110, is_asynchronous=True)
    for i in range(3):
        harness.submit(f"r{i}", prompts[i], 90)
    harness.run(1000)
    assert harness.scheduler.planner.num_retractions > 0 and harness.engine.deepest == 2
    for i in range(3):
        assert harness.tokens(f"r{i}") == expected_output(prompts[i], 90)


def test_the_fake_device_notices_slots_that_leave_too_early() -> None:
    harness = Harness(is_asynchronous=True)
    harness.submit("a", long_prompts(20)[0], 20)
    for _ in range(5):
        harness.scheduler.run_once()
    planner = harness.scheduler.planner
    planner.leave(list(planner.running))
    planner.release_left(set())
    with pytest.raises(AssertionError, match="freed under a running step"):
        harness.scheduler.run_once()


def test_a_grammar_sees_each_token_before_the_next_draw_and_holds_up_no_other() -> None:
    harness = Harness(is_asynchronous=True)
    texts = long_prompts(20)
    harness.submit("a", texts[0], 20, grammar=7)
    harness.submit("b", texts[1], 20)
    harness.run()
    assert harness.tokens("a") == expected_output(texts[0], 7)
    assert harness.finish("a").type == "stop"
    assert harness.tokens("b") == expected_output(texts[1], 20)
    assert harness.engine.deepest == 2


def test_control_finds_no_step_in_flight() -> None:
    """So a client that has its reply may flush the cache."""
    harness = Harness(is_asynchronous=True)
    harness.submit("a", ending_prompt(), 60)
    while not any(o.finish for o in harness.outputs("a")):
        harness.scheduler.run_once()
    assert harness.scheduler.planner.leaving
    harness.mail.inbound.append(Control(call_id="x", action="flush_cache"))
    harness.scheduler.run_once()
    assert [m.ok for m in harness.mail.outbound if isinstance(m, ControlReply)] == [True]
    assert harness.engine.cache.usage().tree_slots == 0


def test_overlap_can_be_disabled() -> None:
    harness = Harness(is_asynchronous=True, disable_overlap=True)
    harness.submit("a", [1, 2, 3], 20)
    harness.run()
    assert harness.engine.deepest == 1


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 3, "top_p": 0.9},
    {"temperature": 0.7, "seed": 4, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 5, "min_new_tokens": 20, "stop_token_ids": tuple(range(128))},
]


def answers(server: Server) -> list[tuple[list[int], list[Any], FinishReason | None]]:
    """Requests of all kinds at once, with a real (tiny) model; tokens, logprobs, finish."""
    for i, kind in enumerate(KINDS):
        sampling = SamplingParams(max_new_tokens=200, ignore_eos=True, **kind)
        logprobs = LogprobOptions(start=290, top_k=2) if i % 2 else None
        server.send(f"r{i}", prompt(i, 300 + 40 * i), sampling, logprobs=logprobs)
    server.run()
    found = []
    for i in range(len(KINDS)):
        outputs = server.outputs(f"r{i}")
        # Logprobs depend in their last bits on what else is in the batch.
        pairs = [
            p for o in outputs for p in [*(o.input_logprobs or []), *(o.output_logprobs or [])]
        ]
        rounded = [(v and round(v, 2), token) for v, token in pairs]
        found.append((server.tokens(f"r{i}"), rounded, server.last(f"r{i}").finish))
    return found


def beside_a_stream(overlap: bool, layered: bool = False) -> tuple[Server, list[list[int]]]:
    """Long prompts that arrive while another request decodes, and all answers."""
    server = Server(overlap=overlap, tca_tail=64)
    server.scheduler.planner.pace.is_layered = layered
    server.submit("stream", prompt(9, 40), 200)
    for _ in range(4):
        server.scheduler.run_once()
    for i in range(3):
        server.submit(f"r{i}", prompt(i, 900 + 150 * i), 20)
    server.run()
    return server, [server.tokens(rid) for rid in ("stream", "r0", "r1", "r2")]


@pytest.mark.parametrize("part_tokens", [512, 100])
def test_layers_between_steps_compute_what_one_step_does(
    monkeypatch: pytest.MonkeyPatch, part_tokens: int
) -> None:
    monkeypatch.setattr(CpuBackend, "part_tokens", part_tokens)
    monkeypatch.setattr(
        PrefillPace, "budget", lambda self, decoding, prompts: 32 if decoding else 256
    )
    advance, layers = LayeredPrefill.advance, []

    def recording(self: LayeredPrefill, spare: float) -> int:
        layers.append(self.step.parts_left)
        # One at a time while others decode, however fast they are.
        return advance(self, min(spare, 0.0))

    with monkeypatch.context() as patch:
        patch.setattr(LayeredPrefill, "advance", recording)
        found = [beside_a_stream(overlap) for overlap in (False, True)]
    # The last layer of a chunk that ends no prompt only stores its keys and values.
    parts = 2 - (-256 // part_tokens)
    most = (found[0][0].engine.shape.num_layers - 1) * parts + 1
    assert layers.count(1) >= layers.count(most) >= 12
    plan = StepPlanner.plan

    def at_once(self: StepPlanner, **state: bool) -> StepPlan:
        made = plan(self, **state)
        return StepPlan(made.decode, [*made.layered]) if made.layered else made

    found.append(beside_a_stream(overlap=True, layered=True))
    monkeypatch.setattr(StepPlanner, "plan", at_once)
    for overlap, (server, answers) in zip((False, True, True), found, strict=True):
        assert answers == beside_a_stream(overlap)[1]
        server.engine.cache.check()


@pytest.mark.parametrize(
    "changes",
    [{"disable_tca": True}, {"tca_refresh": 64}, {"tca_retention": "immediate", "tca_refresh": 64}],
    ids=["dense", "tca", "immediate"],
)
def test_a_real_engine_answers_the_same(changes: dict[str, Any]) -> None:
    one, two = Server(**changes), Server(overlap=True, **changes)
    expected = answers(one)
    assert answers(two) == expected
    assert [len(tokens) for tokens, _, _ in expected[:3]] == [200] * 3
    for i in range(len(KINDS)):
        assert two.last(f"r{i}").tca == pytest.approx(one.last(f"r{i}").tca)
    assert two.engine.cache.usage() == one.engine.cache.usage()
