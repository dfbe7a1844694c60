"""Sessions: data, prompts, and every mode on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from benchmark.quality.configurations import Configuration
from benchmark.quality.conversations import MODES, Prompts, run_conversations
from benchmark.quality.generate import token_counter
from benchmark.quality.markup import Markup
from benchmark.quality.records import Records
from benchmark.quality.samples import Session
from benchmark.quality.sessions import BUILDERS, TURNS, sessions
from tca_runtime.models.loader import LoadedModel


def test_answers_are_in_the_context(tokenizer: Any) -> None:
    made = list(sessions(token_counter(tokenizer), 8000, 2, seed=3))
    assert [s.task for s in made] == [*BUILDERS, *BUILDERS]
    for session in made:
        assert 0.45 * 8000 < len(session.context) < 8000
        assert len(session.turns) == TURNS
        for turn in session.turns:
            for group in turn.answers:
                assert any(answer in session.context for answer in group), session.task
    again = list(sessions(token_counter(tokenizer), 8000, 2, seed=3))
    assert again == made


def test_turns_share_the_context_and_the_past(tokenizer: Any) -> None:
    session = next(sessions(token_counter(tokenizer), 4000, 1, seed=0))
    markup = Markup("<h>", "<a>", "<q>")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    prompts = Prompts.of(session, markup, encode)
    for before, after in zip(prompts.turns, prompts.turns[1:], strict=False):
        assert after[: len(before)] == before
    for ids in (*prompts.turns, *prompts.alone):
        assert ids[: len(prompts.context)] == prompts.context
    last = tokenizer.decode(prompts.turns[-1])
    assert last.endswith(session.turns[-1].text + "<a>")
    assert session.turns[0].gold + "<q>" + session.turns[1].text in last
    assert session.turns[0].text not in tokenizer.decode(prompts.alone[-1])


def brief(session: Session) -> Session:
    """Two turns of a few tokens, so that a test of every mode takes seconds."""
    turns = [replace(turn, max_new_tokens=2) for turn in session.turns[:2]]
    return replace(session, turns=turns)


@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_answers_every_turn(
    mode: str, loaded: LoadedModel, tokenizer: Any, tmp_path: Path
) -> None:
    data = [brief(s) for s in sessions(token_counter(tokenizer), 3600, 1, seed=1)][:3]
    records = Records(tmp_path / "r.jsonl")
    names = ["full", "tca p30 k60"]
    configurations = [Configuration.parse(name) for name in names]
    labels = {"model": "tiny", "data": "s"}
    run_conversations(loaded, tokenizer, data, [mode], configurations, records, labels)
    turns = [r for r in records.records if r["kind"] == "turn"]
    assert len(turns) == 2 * 3 * 2
    found = {(r["config"], r["sample"], r["turn"]) for r in turns}
    assert len(found) == len(turns)
    if MODES[mode].order != "visible":
        assert all(r["cached"] > 0 for r in turns if r["config"] != "full")
    times = {r["config"]: r for r in records.records if r["kind"] == "time"}
    sparse = times["tca p30 k60"]
    assert (sparse["promoted"] > 0) == (mode == "pressure-host")
    drops = MODES[mode].shrink or mode in ("pressure-drop", "pruned")
    assert (sparse["pruned"] > 0) == drops
    if MODES[mode].shrink:
        # The same number of slots, whoever they belong to.
        assert 0.5 < sparse["memory"] < 0.65
    before = len(records.records)
    run_conversations(loaded, tokenizer, data, [mode], configurations, records, labels)
    assert len(records.records) == before
