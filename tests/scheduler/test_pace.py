"""Prompts that arrive while others decode."""

from __future__ import annotations

import pytest

from tca_runtime.config import SchedulerArgs
from tca_runtime.scheduler.pace import MIN_CHUNK, PrefillPace
from tca_runtime.scheduler.request import Request
from tests.scheduler.fakes import EOS, Harness, expected_output

BUDGET, CHUNK = 8, 64


def endless(length: int) -> list[int]:
    """A prompt whose output has ``length`` tokens."""
    return next(p for p in ([i] * 5 for i in range(1, 97)) if EOS not in expected_output(p, length))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    """With a stream that decodes, and a pace that is known."""
    monkeypatch.setattr(PrefillPace, "budget", lambda self, decoding: BUDGET if decoding else CHUNK)
    made = Harness(capacity_tokens=800, chunked_prefill_size=CHUNK)
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


def test_chunks_that_cannot_be_cut_come_one_by_one(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Request, "chunk_quantum", property(lambda self: 16))
    for i in range(3):
        harness.submit(f"r{i}", [20 + i] * 40, 2)
    harness.run()
    mixed = [chunks for decoding, chunks in sizes(harness) if chunks and decoding]
    assert sorted(size for chunks in mixed for size in chunks) == [8] * 3 + [16] * 6
    assert all(chunks in ([16], [8]) for chunks in mixed)


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
    assert settled(pace, 0.050, 0.0001) == MIN_CHUNK
    assert settled(pace, 0.010, 0.0) == 1000
    assert pace.budget(0) == 1000


def test_the_budget_moves_by_steps_and_not_for_lack_of_work() -> None:
    pace = PrefillPace(SchedulerArgs(chunked_prefill_size=1000, max_decode_slowdown=3.0))
    pace.record(4, 0, 0.010)
    pace.record(4, MIN_CHUNK, 0.0101)
    assert pace.budget(4) == 2 * MIN_CHUNK
    pace.record(4, 1, 0.0101)
    assert pace.budget(4) == 2 * MIN_CHUNK
    pace.record(4, 2 * MIN_CHUNK, 9.0)
    assert pace.budget(4) == MIN_CHUNK


def test_pacing_can_be_turned_off() -> None:
    pace = PrefillPace(SchedulerArgs(chunked_prefill_size=1000, max_decode_slowdown=0.0))
    pace.record(4, 1000, 9.0)
    assert pace.budget(4) == 1000
