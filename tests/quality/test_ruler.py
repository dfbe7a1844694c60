"""The RULER tasks: answers in the context, lengths, seeds, scores."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmark.quality.generate import ruler_samples, token_counter
from benchmark.quality.ruler import RULER
from benchmark.quality.samples import Sample, overlap, read, score, write

# A token of the test's tokenizer is a byte, so these are short texts.
LENGTH = 12000


def made(tokenizer: Any, task: str, seed: int = 0, per_task: int = 2) -> list[Sample]:
    return list(ruler_samples(tokenizer, LENGTH, per_task, seed, [task]))


@pytest.mark.parametrize("task", list(RULER))
def test_answers_are_in_the_context_and_lengths_fit(task: str, tokenizer: Any) -> None:
    count = token_counter(tokenizer)
    for sample in made(tokenizer, task):
        tokens = count(sample.text) + sample.max_new_tokens
        assert 0.85 * LENGTH < tokens <= LENGTH
        question = sample.text.index("<|im_start|>assistant")
        for group in sample.answers:
            assert any(answer in sample.text[:question] for answer in group)
            # The beginning of the answer does not give it away.
            assert not any(answer in sample.text[question:] for answer in group)


@pytest.mark.parametrize("task", list(RULER))
def test_a_seed_names_its_samples(task: str, tokenizer: Any) -> None:
    assert made(tokenizer, task) == made(tokenizer, task)
    assert made(tokenizer, task) != made(tokenizer, task, seed=1)
    # More samples do not change the first ones.
    assert made(tokenizer, task, per_task=3)[:2] == made(tokenizer, task)


def test_samples_of_all_tasks_take_turns(tokenizer: Any) -> None:
    names = ["niah_single_1", "fwe", "qa_squad"]
    found = [s.task for s in ruler_samples(tokenizer, LENGTH, 2, 0, names)]
    assert found == names * 2


@pytest.mark.parametrize(
    ("task", "groups"), [("niah_multivalue", 4), ("niah_multiquery", 4), ("niah_multikey_1", 1)]
)
def test_needles_asked_for(task: str, groups: int, tokenizer: Any) -> None:
    for sample in made(tokenizer, task):
        assert len(sample.answers) == groups
        needles = re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", sample.text)
        asked = sample.text[sample.text.index("<|im_start|>assistant") :]
        expected = {value for key, value in needles if key in asked}
        assert expected == {value for (value,) in sample.answers}
        assert len(needles) == 4


def test_variables_follow_the_chain(tokenizer: Any) -> None:
    for sample in made(tokenizer, "vt"):
        value = re.findall(r"assigned the value (\d+)", sample.text)[-1]
        reached: set[str] = set()
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.text):
            if source == value or source in reached:
                reached.add(name)
        assert reached == {name for (name,) in sample.answers}
        assert len(reached) == 5


def test_common_words_are_the_most_common(tokenizer: Any) -> None:
    for sample in made(tokenizer, "cwe"):
        asked = sample.text[sample.text.rindex("Below is a numbered list") :]
        counts = Counter(re.findall(r"\d+\. (\S+)", asked))
        top = {word for word, _ in counts.most_common(10)}
        assert top == {word for (word,) in sample.answers}


def test_frequent_words_are_the_most_frequent(tokenizer: Any) -> None:
    for sample in made(tokenizer, "fwe"):
        body = sample.text[: sample.text.index("\nQuestion")].split("coded words. ")[1]
        counts = Counter(body.split())
        assert [word for word, _ in counts.most_common(4)][0] == "..."
        best = {word for word, _ in counts.most_common(4)} - {"..."}
        assert best == {word for (word,) in sample.answers}


def test_multi_document_questions_have_two_passages(tokenizer: Any) -> None:
    for sample in made(tokenizer, "qa_multidoc"):
        assert len(sample.answers) == 2
        assert sample.answers[0] != sample.answers[1]


def test_score_is_the_share_of_groups_found() -> None:
    assert score("It is 42, and seven.", [["42"], ["SEVEN", "7"]]) == 1.0
    assert score("It is 7.", [["42"], ["seven", "7"]]) == 0.5
    assert score("", [["42"]]) == 0.0


def test_overlap_is_f1_of_words() -> None:
    assert overlap("the cat sat", "The cat sat.") == 1.0
    assert overlap("a dog", "the cat") == 0.0
    # Two of four words given, two of three wanted: 2 * (1/2) * (2/3) / (1/2 + 2/3).
    assert overlap("a b x y", "a b c") == pytest.approx(4 / 7)


def test_files_hold_what_was_written(tokenizer: Any, tmp_path: Path) -> None:
    samples = made(tokenizer, "qa_squad")
    write(tmp_path / "data" / "s.jsonl.xz", samples)
    assert read(tmp_path / "data" / "s.jsonl.xz", Sample) == samples
