"""Prompts that arrive while others decode."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from tca_runtime.config import SchedulerArgs
from tca_runtime.engine.step import BegunStep
from tca_runtime.messages import AbortRequest
from tca_runtime.scheduler.layered_prefill import LayeredPrefill
from tca_runtime.scheduler.pace import LAYERED_TOKENS, MIN_CHUNK, PrefillPace
from tca_runtime.scheduler.planner import PAST_PER_TOKEN
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.policies import create_policy
from tca_runtime.sparsity.settings import SparsitySettings
from tests.scheduler.fakes import EOS, HEADS, LAYERS, Harness, expected_output

BUDGET, CHUNK = 8, 64
PAST = PAST_PER_TOKEN["cpu"]
TABLE = BudgetTable.uniform(0.5, LAYERS, HEADS, block=4)
# No prompt here is long enough for its default window.
SHORT = SparsitySettings(create_policy("tca"), TABLE, TABLE)
# Selections begin at token 16 and take 16 tokens.
SELECTING = replace(SHORT, window=4, min_candidates=4, probes=4, granularity=16, tail=0)


def endless(length: int) -> list[int]:
    """A prompt whose output has ``length`` tokens."""
    return next(p for p in ([i] * 5 for i in range(1, 97)) if EOS not in expected_output(p, length))


@pytest.fixture
def known_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PrefillPace, "budget", lambda self, decoding, prompts: BUDGET if decoding else CHUNK
    )


@pytest.fixture(params=[None, SHORT], ids=["full", "selection"])
def harness(request: pytest.FixtureRequest, known_pace: None) -> Harness:
    return streaming(request.param)


@pytest.fixture
def selecting(known_pace: None) -> Harness:
    return streaming(SELECTING)


def streaming(sparsity: SparsitySettings | None, is_asynchronous: bool = False) -> Harness:
    """With a stream that decodes."""
    made = Harness(
        capacity_tokens=800,
        sparsity=sparsity,
        chunked_prefill_size=CHUNK,
        is_asynchronous=is_asynchronous,
    )
    made.submit("stream", endless(60), 60)
    for _ in range(3):
        made.scheduler.run_once()
    made.engine.steps.clear()
    return made


def sizes(harness: Harness) -> list[tuple[int, list[int]]]:
    """Per step, how many requests decode, and the lengths of the chunks."""
    return [(len(s.decode), [len(c.tokens) for c in s.chunks]) for s in harness.engine.steps]


def test_a_long_prompt_is_cut_to_the_pace_and_the_stream_never_waits(harness: Harness) -> None:
    harness.submit("long", [7] * 100, 2)
    harness.submit("short", [8] * 20, 2)
    harness.run()
    steps = sizes(harness)
    mixed = [chunks for decoding, chunks in steps if chunks and decoding]
    assert sum(map(sum, mixed)) == 120
    assert all(sum(chunks) <= BUDGET for chunks in mixed)
    assert all(decoding for decoding, chunks in steps if chunks)
    assert harness.tokens("long") == expected_output([7] * 100, 2)
    assert harness.tokens("short") == expected_output([8] * 20, 2)


def spans(harness: Harness, first: int) -> list[tuple[int, int, bool]]:
    """Begin, end and ``sees_past`` of the chunks of the prompt that consists of ``first``."""
    chunks = [c for s in harness.engine.steps for c in s.chunks if c.tokens[0] == first]
    ends = np.cumsum([len(c.tokens) for c in chunks]).tolist()
    return [(end - len(c.tokens), end, c.sees_past) for c, end in zip(chunks, ends, strict=True)]


def test_chunks_that_select_are_computed_whole_but_a_few_layers_at_a_time(
    selecting: Harness,
) -> None:
    for i in range(3):
        selecting.submit(f"r{i}", [20 + i] * 40, 2)
    selecting.run()
    steps = sizes(selecting)
    assert all(sum(chunks) <= BUDGET for decoding, chunks in steps if decoding)
    whole = [chunks for decoding, chunks in steps if chunks and not decoding]
    assert whole == [[16]] * 3 and selecting.engine.begun == 3
    assert sum(sum(chunks) for _, chunks in steps) == 120
    for i in range(3):
        cut = spans(selecting, 20 + i)
        assert all(end <= 16 for _, end, sees_past in cut if sees_past)
        assert [span for span in cut if not span[2]] == [(16, 32, False), (32, 40, False)]
        assert selecting.tokens(f"r{i}") == expected_output([20 + i] * 40, 2)


def test_streams_go_on_between_the_layers_of_a_long_chunk(selecting: Harness) -> None:
    selecting.submit("r", [20] * 32, 2)
    decoding = []
    for _ in range(40):
        before = len(selecting.engine.steps)
        selecting.scheduler.run_once()
        if selecting.scheduler._layered is not None:
            decoding += [len(s.decode) for s in selecting.engine.steps[before:]]
    # It begins beside a step; then one layer of 16 tokens is worth the budget.
    assert decoding == [1] * (1 + LAYERS)
    selecting.run()
    assert selecting.tokens("r") == expected_output([20] * 32, 2)


@pytest.mark.parametrize("overlap", [False, True])
def test_far_into_a_prompt_chunks_are_not_cut_small(known_pace: None, overlap: bool) -> None:
    busy = streaming(None, is_asynchronous=overlap)
    busy.submit("r", [20] * 400, 2)
    busy.run()
    cut = spans(busy, 20)
    near = [end - begin for begin, end, _ in cut if begin < PAST * BUDGET]
    far = [(begin, end - begin) for begin, end, _ in cut[:-1] if begin > PAST * BUDGET]
    assert set(near) == {BUDGET}
    # The stream ends before the prompt does.
    assert far and all(size in (begin // PAST, CHUNK) for begin, size in far)
    # Those run between steps, layer by layer.
    assert busy.engine.begun >= len([size for _, size in far if BUDGET < size < CHUNK])
    assert busy.tokens("r") == expected_output([20] * 400, 2)
    busy.engine.cache.check()


@pytest.mark.parametrize("overlap", [False, True])
def test_who_ends_during_a_long_chunk_leaves_it_unfinished(known_pace: None, overlap: bool) -> None:
    busy = streaming(SELECTING, is_asynchronous=overlap)
    busy.submit("r", [20] * 32, 2)
    scheduler = busy.scheduler
    while scheduler._layered is None:
        scheduler.run_once()
    busy.mail.inbound.append(AbortRequest(rid="r"))
    for _ in range(2):
        scheduler.run_once()
    assert busy.last("r").finish is not None
    assert scheduler._layered is None and not scheduler.planner.leaving
    assert [c for c in spans(busy, 20) if not c[2]] == []
    busy.run()
    busy.engine.cache.check()
    # What only some layers have computed must not be found in the cache.
    busy.submit("again", [20] * 32, 2)
    busy.run()
    assert busy.tokens("again") == expected_output([20] * 32, 2)


@pytest.fixture
def layered(monkeypatch: pytest.MonkeyPatch) -> Harness:
    """As on a GPU, with a stream that decodes."""
    made = streaming(SELECTING, is_asynchronous=True)
    monkeypatch.setattr(made.scheduler.planner.pace, "is_layered", True)
    return made


def test_on_a_gpu_no_step_decodes_and_prefills(layered: Harness) -> None:
    prompts = {f"r{i}": [20 + i] * (5 + 9 * i) for i in range(6)}
    for rid, prompt in prompts.items():
        layered.submit(rid, prompt, 4)
    layered.run()
    assert all(not (decoding and chunks) for decoding, chunks in sizes(layered))
    # Those that can be computed together are, and the stream goes on between their layers.
    assert max(len(chunks) for _, chunks in sizes(layered)) > 1
    assert layered.engine.begun == len([chunks for _, chunks in sizes(layered) if chunks])
    for rid, prompt in prompts.items():
        assert layered.tokens(rid) == expected_output(prompt, 4)
    layered.engine.cache.check()


@pytest.mark.parametrize("ending", [["r0"], ["r1"], ["r0", "r1"]])
def test_chunks_go_on_until_all_their_requests_have_ended(
    layered: Harness, ending: list[str]
) -> None:
    prompts = {"r0": [20] * 9, "r1": [21] * 9}
    for rid, prompt in prompts.items():
        layered.submit(rid, prompt, 3)
    scheduler = layered.scheduler
    while scheduler._layered is None:
        scheduler.run_once()
    assert len(scheduler._layered.chunks) == 2
    for rid in ending:
        layered.mail.inbound.append(AbortRequest(rid=rid))
    scheduler.run_once()
    scheduler.run_once()
    assert (scheduler._layered is None) == (len(ending) == 2)
    layered.run()
    layered.engine.cache.check()
    for rid, prompt in prompts.items():
        finish = layered.last(rid).finish
        assert finish is not None and (finish.type == "abort") == (rid in ending)
        # What was computed for one that ended is whole, or not in the cache.
        layered.submit(f"{rid}-again", prompt, 3)
        layered.run()
        assert layered.tokens(f"{rid}-again") == expected_output(prompt, 3)
    layered.engine.cache.check()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_grammar_follows_a_prompt_that_ends_with_a_long_chunk(
    known_pace: None, overlap: bool
) -> None:
    busy = streaming(SELECTING, is_asynchronous=overlap)
    busy.submit("r", [20] * 32, 9, grammar=4)
    busy.run()
    assert busy.tokens("r") == expected_output([20] * 32, 4) and busy.engine.begun == 1


def test_a_run_behind_a_cached_prefix_has_enough_queries_to_choose(known_pace: None) -> None:
    made = streaming(replace(SELECTING, tail=8))
    made.submit("first", [20] * 30, 1)
    made.run()
    made.engine.steps.clear()
    made.submit("next", [20] * 30 + expected_output([20] * 30, 1) + [21] * 11, 1)
    made.run()
    chunks = [c for s in made.engine.steps for c in s.chunks]
    assert sum(len(c.tokens) for c in chunks) <= 16
    assert all(c.sees_past or len(c.tokens) >= 4 for c in chunks)


def test_the_queries_that_choose_a_decode_view_stay_together(known_pace: None) -> None:
    for length in range(9, 33):
        busy = streaming(replace(SELECTING, granularity=CHUNK))
        busy.submit("r", [20] * length, 2)
        busy.run()
        cut = spans(busy, 20)
        assert cut[-1][1] == length and all(sees_past for *_, sees_past in cut)
        assert all(end - begin <= BUDGET for begin, end, _ in cut)
        assert cut[-1][1] - cut[-1][0] >= 4


def test_more_probes_than_the_pace_allows_are_computed_at_once(known_pace: None) -> None:
    busy = streaming(replace(SELECTING, granularity=CHUNK, probes=12))
    busy.submit("r", [20] * 30, 2)
    busy.run()
    assert [(begin, end) for begin, end, _ in spans(busy, 20)] == [
        (0, 8),
        (8, 16),
        (16, 18),
        (18, 30),
    ]


def test_an_idle_server_takes_whole_chunks(harness: Harness) -> None:
    harness.run()
    harness.engine.steps.clear()
    harness.submit("long", [7] * 100, 2)
    harness.run()
    assert [chunks for _, chunks in sizes(harness) if chunks] == [[CHUNK], [100 - CHUNK]]


def settled(pace: PrefillPace, fixed: float, per_token: float) -> int:
    """The budget after many mixed steps on a device where they cost so much."""
    for _ in range(40):
        tokens = pace.budget(4)
        pace.record(4, tokens, fixed + per_token * tokens)
    return pace.budget(4)


def test_the_budget_follows_what_mixed_steps_take() -> None:
    pace = PrefillPace(SchedulerArgs(chunked_prefill_size=1000, max_decode_slowdown=3.0))
    assert pace.budget(0) == 1000
    assert pace.budget(4) == MIN_CHUNK
    for _ in range(3):
        pace.record(4, 0, 0.010)
    assert 190 <= settled(pace, 0.010, 0.0001) <= 200
    assert 90 <= settled(pace, 0.020, 0.0001) <= 100
    assert settled(pace, 0.010, 0.01) == MIN_CHUNK
    assert settled(pace, 0.010, 0.0) == 1000
    assert pace.budget(0) == 1000


def test_the_budget_moves_by_steps_and_not_for_lack_of_work() -> None:
    pace = PrefillPace(SchedulerArgs(chunked_prefill_size=1000, max_decode_slowdown=3.0))
    pace.record(4, 0, 0.010)
    pace.record(4, MIN_CHUNK, 0.0101)
    assert pace.budget(4) == MIN_CHUNK * 5 // 4
    pace.record(4, 1, 0.0101)
    assert pace.budget(4) == MIN_CHUNK * 5 // 4
    pace.record(4, MIN_CHUNK * 5 // 4, 9.0)
    assert pace.budget(4) == MIN_CHUNK


@pytest.mark.parametrize(
    ("prompts", "raised"), [(0, 1), (1, 1), (2, 1), (3, 1.5), (4, 2), (8, 4), (1000, 8)]
)
def test_prompts_that_pile_up_before_few_streams_raise_the_budget(
    prompts: int, raised: float
) -> None:
    pace = PrefillPace(SchedulerArgs(chunked_prefill_size=1000, max_decode_slowdown=3.0))
    assert pace.budget(4, prompts) == MIN_CHUNK * raised
    assert pace.budget(32, prompts) == MIN_CHUNK * max(1, min(prompts / 16, 8))
    pace = PrefillPace(SchedulerArgs(chunked_prefill_size=100, max_decode_slowdown=3.0))
    assert pace.budget(4, prompts) == min(MIN_CHUNK * raised, 100)


def test_pacing_can_be_turned_off() -> None:
    pace = PrefillPace(SchedulerArgs(chunked_prefill_size=1000, max_decode_slowdown=0.0))
    pace.record(4, 1000, 9.0)
    assert pace.budget(4) == 1000


class Layers:
    """Stands for a step of which some layers were launched."""

    def __init__(self, count: int) -> None:
        self.parts_left = count

    def advance(self, num_parts: int) -> None:
        self.parts_left -= min(num_parts, self.parts_left)


def test_as_many_layers_run_between_steps_as_there_is_time_for() -> None:
    long = LayeredPrefill([], cast("BegunStep", Layers(30)))
    assert long.advance(1.0) == 1
    long.note(1, 0.2)
    assert long.advance(1.0) == 5
    long.note(5, 2.8)
    assert long.advance(1.0) == 3
    assert long.advance(0.0) == 1
    assert long.advance(math.inf) == 20 and long.is_done


def test_a_gpu_remembers_what_a_layer_takes() -> None:
    pace = PrefillPace(SchedulerArgs(max_decode_slowdown=2.2), "cuda")
    assert pace.part_seconds(200) is None
    pace.note_part(200, 0.5)
    assert pace.part_seconds(250) == 0.5 and pace.part_seconds(2000) is None
    assert pace.budget(32) == LAYERED_TOKENS and pace.budget(0) == 8192
    assert pace.budget(2, 30) == 8192
    known = LayeredPrefill([], cast("BegunStep", Layers(30)), 0.5)
    # The device may have waited for the first ones.
    known.note(2, 0.1)
    assert known.part_seconds == 0.5
    known.note(2, 2.0)
    assert known.part_seconds == 0.75
    # Nor does the last one say that the next chunk is cheap, but that it is dear.
    known.advance(math.inf)
    known.note(1, 0.1)
    assert known.part_seconds == 0.75
    known.note(1, 1.5)
    assert known.part_seconds == 1.5


def test_time_beside_a_step_follows_from_what_it_takes() -> None:
    pace = PrefillPace(SchedulerArgs(max_decode_slowdown=3.0))
    assert pace.spare(4) == 0.0
    pace.record(4, 0, 0.010)
    assert pace.spare(4) == pytest.approx(0.020)
    assert pace.spare(4, 4) == pytest.approx(0.040)
    assert pace.beyond_decode(0.025) == pytest.approx(0.015)
    assert pace.spare(0) == math.inf
    assert PrefillPace(SchedulerArgs(max_decode_slowdown=0.0)).spare(4) == math.inf
