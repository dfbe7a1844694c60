"""Short prompts, which selection must leave alone: GSM8K and MMLU, few-shot."""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmark.quality import sources
from benchmark.quality.markup import Markup
from benchmark.quality.samples import Sample

SHOTS = 5
LETTERS = "ABCD"


def gsm8k(markup: Markup, count: int, seed: int) -> Iterator[Sample]:
    """Grade-school problems with worked examples (arXiv 2110.14168); the last number counts."""
    rows = sources.gsm8k()
    for number in random.Random(seed).sample(range(len(rows)), count):
        prompt, answer = rows[number]
        yield Sample(
            id=f"gsm8k/{seed}/{number}",
            task="gsm8k",
            length=2048,
            text=markup.prompt(prompt.removesuffix("Answer:"), "Answer:"),
            answers=[[answer]],
            max_new_tokens=320,
            metric="last-number",
        )


def mmlu(markup: Markup, count: int, seed: int) -> Iterator[Sample]:
    """Multiple choice in 57 subjects in turn (arXiv 2009.03300), five examples each."""
    rng = random.Random(seed)
    subjects = sources.mmlu_subjects()
    for number in range(count):
        subject = subjects[number % len(subjects)]
        examples = sources.mmlu(subject, "dev")[:SHOTS]
        questions = sources.mmlu(subject, "test")
        which = rng.randrange(len(questions))
        asked = questions[which]
        shown = [_question(q) + f" {LETTERS[q.answer]}" for q in examples]
        head = f"The following are multiple choice questions about {subject.replace('_', ' ')}."
        prompt = "\n\n".join([head, *shown, _question(asked)])
        yield Sample(
            id=f"mmlu/{seed}/{number}/{subject}/{which}",
            task="mmlu",
            length=2048,
            text=markup.prompt(prompt.removesuffix("Answer:"), "Answer:"),
            answers=[[LETTERS[asked.answer]]],
            max_new_tokens=4,
            metric="choice",
        )


def _question(question: sources.Choice) -> str:
    lines = [question.question.strip()]
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=True)]
    return "\n".join([*lines, "Answer:"])
