"""Short prompts: grades, few-shot prompts, and the OpenAI route."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmark.quality import http, samples, sources
from benchmark.quality.markup import Markup
from benchmark.quality.records import read
from benchmark.quality.samples import grade
from benchmark.quality.short import gsm8k, mmlu
from benchmark.quality.sources import Choice


@pytest.mark.parametrize(
    ("output", "answer", "metric", "expected"),
    [
        ("5 + 6 = 11. So the answer is 1,100.", "1100", "last-number", 1.0),
        ("The answer is 11.00", "11", "last-number", 1.0),
        ("The answer is -3", "3", "last-number", 0.0),
        ("No idea", "3", "last-number", 0.0),
        (" B. Because", "B", "choice", 1.0),
        (" Because", "B", "choice", 0.0),
        ("A or B", "B", "choice", 0.0),
        ("so b", "b", "match", 1.0),
    ],
)
def test_grades(output: str, answer: str, metric: str, expected: float) -> None:
    assert grade(output, [[answer]], metric) == expected


@pytest.fixture
def texts_of_short_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        (f"Question: 1+1?\nAnswer: 2.\n\nQuestion: {i}+1?\nAnswer:", str(i + 1)) for i in range(9)
    ]
    choices = [Choice(f"Q{i}?", ("w", "x", "y", "z"), i % 4) for i in range(8)]
    monkeypatch.setattr(sources, "gsm8k", lambda: rows)
    monkeypatch.setattr(sources, "mmlu_subjects", lambda: ["art", "law_of_nature"])
    monkeypatch.setattr(sources, "mmlu", lambda subject, split: choices)


@pytest.mark.usefixtures("texts_of_short_tasks")
def test_prompts_end_where_the_answer_begins(tokenizer: Any) -> None:
    markup = Markup.of(tokenizer)
    for make in (gsm8k, mmlu):
        made = list(make(markup, 4, 1))
        assert made == list(make(markup, 4, 1))
        assert len({s.id for s in made}) == 4
        assert all(s.text.endswith("<|im_start|>assistant\nAnswer:") for s in made)
    for sample in gsm8k(markup, 4, 1):
        number = int(sample.text.rsplit("Question: ", 1)[1].split("+")[0])
        assert sample.answers == [[str(number + 1)]]
    for sample in mmlu(markup, 4, 1):
        asked = int(sample.text.rsplit("\n\nQ", 1)[1].split("?")[0])
        assert sample.answers == [["ABCD"[asked % 4]]]
        assert sample.text.count("Answer: ") == 5
    assert "law of nature" in list(mmlu(markup, 4, 1))[1].text


@pytest.mark.usefixtures("texts_of_short_tasks")
def test_answers_through_the_openai_route_go_on(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = list(mmlu(Markup.of(tokenizer), 5, 0))
    samples.write(tmp_path / "mmlu-2048.jsonl.xz", data)
    asked: list[str] = []

    async def fake(session: Any, url: str, sample: samples.Sample) -> dict[str, Any]:
        asked.append(sample.id)
        if sample is not None and len(asked) == 4:
            raise http.ServerError("503: too busy")
        return {"choices": [{"text": " A"}], "usage": {"prompt_tokens": 7}}

    monkeypatch.setattr(http, "answer", fake)
    parser = argparse.ArgumentParser()
    http.add_arguments(parser)
    command = ["--name", "full", "--model", "tiny", "--data", str(tmp_path / "mmlu-2048.jsonl.xz")]
    command += ["--output", str(tmp_path / "r.jsonl"), "--concurrency", "1"]
    with pytest.raises(ExceptionGroup):
        http.run(parser.parse_args(command))
    http.run(parser.parse_args(command))
    assert len(asked) == 6
    found = list(read(tmp_path / "r.jsonl"))
    assert sorted(r["sample"] for r in found) == sorted(s.id for s in data)
    right = {s.id: s.answers == [["A"]] for s in data}
    assert {r["sample"]: bool(r["score"]) for r in found} == right
