"""Needles in a haystack: single, multi-key, multi-value and multi-query retrieval."""

from __future__ import annotations

import random
import re
import uuid
from dataclasses import dataclass
from functools import cache

from benchmark.quality import sources
from benchmark.quality.ruler.base import Draft, RulerTask

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
# Places of needles in an essay, in percent.
DEPTHS = [round(100 * i / 39) for i in range(40)]


@dataclass(frozen=True)
class Niah(RulerTask):
    """Key-value pairs hidden in ``noise``, in an ``essay``, or among other pairs (``needle``).

    Parameters
    ----------
    key_kind, value_kind : ``words``, ``numbers`` or ``uuids``
    keys, values, queries : needles' keys, values of each key, keys asked for
    """

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    max_new_tokens: int = 128

    @property
    def step(self) -> int:  # type: ignore[override]
        return 64 if self.haystack == "essay" else 4

    def build(self, rng: random.Random, size: int, short: bool) -> Draft:
        keys = [draw(rng, self.key_kind) for _ in range(self.keys)]
        values = [[draw(rng, self.value_kind) for _ in range(self.values)] for _ in keys]
        needles = [self._needle(k, v) for k, vs in zip(keys, values, strict=True) for v in vs]
        rng.shuffle(needles)
        context = self._hide(rng, needles, size)
        asked = rng.sample(range(len(keys)), self.queries)
        names = [keys[i] for i in asked]
        query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
        answers = [[value] for i in asked for value in values[i]]
        template, prefix, kind = TEMPLATE, PREFIX, self.value_kind
        if len(answers) == 1:
            template, prefix = _singular(TEMPLATE), _singular(PREFIX)
            kind = kind.removesuffix("s")
        return Draft(
            template.format(kind=kind, context=context, query=query),
            prefix.format(kind=kind, query=query),
            answers,
        )

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _hide(self, rng: random.Random, needles: list[str], size: int) -> str:
        if self.haystack == "essay":
            return hide_in_essay(rng, needles, size)
        if self.haystack == "noise":
            lines = [NOISE] * size
        else:
            lines = [
                self._needle(draw(rng, self.key_kind), draw(rng, self.value_kind))
                for _ in range(size)
            ]
        places = sorted(rng.sample(range(size + 1), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def hide_in_essay(rng: random.Random, needles: list[str], num_words: int) -> str:
    """``num_words`` words of essays from a random place on, with needles between sentences."""
    words = essay_words()
    begin = rng.randrange(len(words))
    rotated = words[begin:] + words[:begin]
    repeats = -(-num_words // len(words))
    sentences = re.split(r"(?<=[.!?])\s+", " ".join((rotated * repeats)[:num_words]))
    depths = sorted(rng.sample(DEPTHS, len(needles)), reverse=True)
    for depth, needle in zip(depths, needles, strict=True):
        sentences.insert(len(sentences) * depth // 100, needle)
    return " ".join(sentences)


@cache
def essay_words() -> list[str]:
    return sources.essays().split()


@cache
def _nouns_and_adjectives() -> tuple[list[str], list[str]]:
    return sources.words("noun"), sources.words("adjective")


def draw(rng: random.Random, kind: str) -> str:
    """A random word pair, seven-digit number or UUID."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    nouns, adjectives = _nouns_and_adjectives()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def _singular(template: str) -> str:
    text = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
    return text.replace("answers", "answer")
