"""Prompts with their answers, and the compressed files that hold them."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, ready to be tokenised.

    ``length`` is the nominal size in tokens, output included. ``answers`` are groups of
    alternatives, graded as ``metric`` says: with ``match`` a group counts when any of its strings
    is in the output, and the score is the share of groups that count.
    """

    id: str
    task: str
    length: int
    text: str
    answers: list[list[str]]
    max_new_tokens: int
    metric: str = "match"


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One question about a session's context.

    ``text`` is the question, ``gold`` the answer that later turns see as the conversation's past.
    """

    text: str
    gold: str
    answers: list[list[str]]
    max_new_tokens: int
    metric: str = "match"


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One long context and several questions about it; chat markup is added when it is run."""

    id: str
    task: str
    length: int
    context: str
    turns: list[Turn]


Item = TypeVar("Item", bound=msgspec.Struct)


def score(output: str, answers: list[list[str]]) -> float:
    """Share of the groups of which an alternative is in the output, whatever the case."""
    text = output.lower()
    return sum(any(a.lower() in text for a in group) for group in answers) / len(answers)


def grade(output: str, answers: list[list[str]], metric: str) -> float:
    """Score of an output: ``match``, ``overlap``, ``last-number`` or ``choice``."""
    if metric == "overlap":
        return overlap(output, answers[0][0])
    if metric == "last-number":
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", output)
        return float(bool(numbers) and _value(numbers[-1]) == _value(answers[0][0]))
    if metric == "choice":
        letter = re.search(r"\b([A-D])\b", output)
        return float(letter is not None and letter[1] == answers[0][0])
    return score(output, answers)


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def overlap(output: str, reference: str) -> float:
    """ROUGE-1 F1: how many words output and reference share."""
    mine, theirs = _counts(output), _counts(reference)
    common = sum(min(count, theirs.get(word, 0)) for word, count in mine.items())
    if not common:
        return 0.0
    precision, recall = common / sum(mine.values()), common / sum(theirs.values())
    return 2 * precision * recall / (precision + recall)


def write(path: Path, items: Iterable[msgspec.Struct]) -> None:
    """Write JSON lines, xz-compressed: samples share long texts, which gzip would not find."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wb", preset=6) as file:
        for item in items:
            file.write(msgspec.json.encode(item) + b"\n")


def read(path: Path, kind: type[Item]) -> list[Item]:
    """What ``write`` wrote."""
    with lzma.open(path, "rb") as file:
        return [msgspec.json.decode(line, type=kind) for line in file]


def _counts(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in text.lower().split():
        word = word.strip(".,;:!?\"'()[]")
        if word:
            counts[word] = counts.get(word, 0) + 1
    return counts
