"""Questions about SQuAD passages among many others."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmark.quality import sources
from benchmark.quality.ruler.base import Draft, RulerTask
from benchmark.quality.sources import Document

_ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)
TEMPLATE = (
    _ORDER + "\n\nThe following are given documents.\n\n{context}\n\n" + _ORDER + "\n\n"
    "Question: {query}"
)
PREFIX = " Answer:"
_ORDERS = _ORDER.replace("the question", "both questions").replace("the answer", "the two answers")
MULTI_TEMPLATE = (
    _ORDERS + "\n\nThe following are given documents.\n\n{context}\n\n" + _ORDERS + "\n\n"
    "Question 1: {first}\nQuestion 2: {second}"
)
MULTI_PREFIX = " Answers:"


@dataclass(frozen=True)
class SingleDocument(RulerTask):
    """RULER's ``qa_1``: one question, its passage among passages of the same and other articles."""

    max_new_tokens: int = 32
    step: int = 1

    def build(self, rng: random.Random, size: int, short: bool) -> Draft:
        documents = sources.squad()
        chosen = rng.choice(documents)
        question, answers = rng.choice(chosen.questions)
        context = _context(rng, [chosen], size)
        return Draft(TEMPLATE.format(context=context, query=question), PREFIX, [list(answers)])


@dataclass(frozen=True)
class MultiDocument(RulerTask):
    """In the place of RULER's HotpotQA: two questions whose answers are in two passages.

    Unlike HotpotQA's, the two facts need not be combined.
    """

    max_new_tokens: int = 48
    step: int = 1

    def build(self, rng: random.Random, size: int, short: bool) -> Draft:
        chosen = rng.sample(sources.squad(), 2)
        asked = [rng.choice(document.questions) for document in chosen]
        context = _context(rng, chosen, size)
        (first, _), (second, _) = asked
        user = MULTI_TEMPLATE.format(context=context, first=first, second=second)
        return Draft(user, MULTI_PREFIX, [list(answers) for _, answers in asked])


def _context(rng: random.Random, chosen: list[Document], size: int) -> str:
    """The chosen passages and as many others as ``size`` allows, same articles first."""
    titles = {document.title for document in chosen}
    others = [d for d in sources.squad() if d not in chosen]
    rng.shuffle(others)
    others.sort(key=lambda d: d.title not in titles)
    documents = chosen + others[: max(0, size - len(chosen))]
    rng.shuffle(documents)
    return "\n\n".join(f"Document {i}:\n{d.text}" for i, d in enumerate(documents, 1))
