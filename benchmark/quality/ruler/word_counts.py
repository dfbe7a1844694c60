"""Aggregation: the most common words of a list, the most frequent words of a coded text."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from functools import cache

from benchmark.quality import sources
from benchmark.quality.ruler.base import Draft, RulerTask

COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FREQUENT_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the "
    "above coded text?"
)
FREQUENT_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
NUM_COMMON = 10
# zeta(2): the sum of 1 / k^2.
ZETA_2 = 1.6449340668482264


@dataclass(frozen=True)
class CommonWords(RulerTask):
    """Ten words that appear more often than the others; one worked example comes first."""

    max_new_tokens: int = 120
    step: int = 8

    def build(self, rng: random.Random, size: int, short: bool) -> Draft:
        often, seldom = (6, 1) if short else (30, 3)
        few = _listed(rng, 20, 3, 1) if short else _listed(rng, 40, 10, 3)
        solved = f"{COMMON_TEMPLATE.format(context=few[0])}{COMMON_PREFIX} {_numbered(few[1])}"
        context, common = _listed(rng, size + NUM_COMMON, often, seldom)
        asked = COMMON_TEMPLATE.format(context=context)
        return Draft(f"{solved}\n{asked}", COMMON_PREFIX, [[word] for word in common])


@dataclass(frozen=True)
class FrequentWords(RulerTask):
    """Invented words whose frequencies fall with the square of their rank; dots rank first."""

    max_new_tokens: int = 50
    step: int = 32

    def build(self, rng: random.Random, size: int, short: bool) -> Draft:
        vocabulary: list[str] = []
        while len(vocabulary) < max(20, size // 20):
            word = "".join(rng.choices(string.ascii_lowercase, k=6))
            if word not in vocabulary:
                vocabulary.append(word)
        vocabulary[0] = "..."
        text: list[str] = []
        for rank, word in enumerate(vocabulary, 1):
            text += [word] * int(size / (rank * rank * ZETA_2))
        rng.shuffle(text)
        answers = [[word] for word in vocabulary[1:4]]
        return Draft(FREQUENT_TEMPLATE.format(context=" ".join(text)), FREQUENT_PREFIX, answers)


def _listed(rng: random.Random, num_words: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """A shuffled numbered list, and the words that are in it often."""
    chosen = rng.sample(_vocabulary(), num_words)
    common, rest = chosen[:NUM_COMMON], chosen[NUM_COMMON:]
    listed = common * often + rest * seldom
    rng.shuffle(listed)
    return _numbered(listed), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


@cache
def _vocabulary() -> list[str]:
    kinds = ("noun", "adjective", "verb")
    return sorted({word for kind in kinds for word in sources.words(kind)})
