"""Contexts shared by several questions, after SCBench (arXiv 2412.10319): the data.

Key-value retrieval, several needles, questions about passages, many-shot classification, and
summaries scored by the words they share with the reference.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Iterator

from benchmark.quality import sources
from benchmark.quality.ruler.niah import draw, hide_in_essay
from benchmark.quality.samples import Session, Turn

TURNS = 5
_BRIEFLY = "Answer briefly, with the answer only."
_SHAPES = ("oblong", "spiral", "lattice", "ribbon", "dome", "prism")
# Invented classes, so that only the examples in the context can teach them.
_CLASSES = ("zorvan", "mipple", "quandle", "brell", "fostic", "tramble")
_COLOURS = ("amber", "violet", "scarlet", "emerald", "silver", "copper", "ivory", "cobalt")
_NAMES = ("Amara", "Bruno", "Celia", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas")

Builder = Callable[[random.Random, int], tuple[str, list[Turn]]]


def sessions(
    count_tokens: Callable[[str], int], length: int, per_task: int, seed: int
) -> Iterator[Session]:
    """Sessions of every task in turn, each with a context of just under ``length`` tokens."""
    limit = length - 512
    sizes: dict[str, int] = {}
    for index in range(per_task):
        for name, build in BUILDERS.items():
            identity = f"{name}/{length}/{seed}/{index}"
            size = sizes.get(name, length // 16)
            for attempt in range(20):
                context, turns = build(random.Random(identity), size)
                tokens = count_tokens(context)
                # Sizes are coarse, and texts differ: what fits is taken after a few attempts.
                if limit * (0.93 if attempt < 6 else 0.5) <= tokens <= limit:
                    break
                size = max(1, int(size * limit * (0.97 - 0.02 * attempt) / tokens))
            else:
                raise ValueError(f"{name} does not fit {length} tokens")
            sizes[name] = size
            yield Session(id=identity, task=name, length=length, context=context, turns=turns)


def key_values(rng: random.Random, size: int) -> tuple[str, list[Turn]]:
    """A JSON record of UUIDs, and look-ups in it."""
    entries = [(_uuid(rng), _uuid(rng)) for _ in range(max(TURNS, size // 4))]
    record = "{\n" + ",\n".join(f'"{k}": "{v}"' for k, v in entries) + "\n}"
    turns = [
        _turn(f'What is the value of the key "{key}"? {_BRIEFLY}', value, 48)
        for key, value in rng.sample(entries, TURNS)
    ]
    return f"Look up keys in this JSON record.\n\n{record}\n\n", turns


def needles(rng: random.Random, size: int) -> tuple[str, list[Turn]]:
    """Ten numbers hidden in essays, asked for one or two at a time."""
    facts: dict[str, str] = {}
    while len(facts) < 10:
        facts[draw(rng, "words")] = draw(rng, "numbers")
    hidden = [f"One of the special magic numbers for {k} is: {v}." for k, v in facts.items()]
    context = hide_in_essay(rng, hidden, max(size * 12, 200))
    asked = rng.sample(list(facts), TURNS + 2)
    groups = [[key] for key in asked[: TURNS - 2]] + [asked[-4:-2], asked[-2:]]
    turns = []
    for keys in groups:
        values = [facts[key] for key in keys]
        text = f"What is the special magic number for {' and for '.join(keys)}? {_BRIEFLY}"
        turns.append(
            Turn(
                text=text, gold=", ".join(values), answers=[[v] for v in values], max_new_tokens=32
            )
        )
    return f"Special magic numbers are hidden in this text.\n\n{context}\n\n", turns


def passages(rng: random.Random, size: int) -> tuple[str, list[Turn]]:
    """SQuAD passages, and questions about different ones."""
    documents = rng.sample(sources.squad(), min(len(sources.squad()), max(TURNS, size // 12)))
    context = "\n\n".join(f"Document {i}:\n{d.text}" for i, d in enumerate(documents, 1))
    turns = []
    for document in rng.sample(documents, TURNS):
        question, answers = rng.choice(document.questions)
        turns.append(_turn(f"{question} {_BRIEFLY}", list(answers), 32))
    return f"Read these documents.\n\n{context}\n\n", turns


def many_shot(rng: random.Random, size: int) -> tuple[str, list[Turn]]:
    """Hundreds of labelled objects whose class follows from their shape, then new ones."""
    classes = rng.sample(_CLASSES, len(_SHAPES))
    of_shape = dict(zip(_SHAPES, classes, strict=True))

    def describe(shape: str) -> str:
        size_, colour = rng.randrange(2, 90), rng.choice(_COLOURS)
        return f"a {colour} {shape}, {size_} cm wide, made by {rng.choice(_NAMES)}"

    shapes = [rng.choice(_SHAPES) for _ in range(max(12, size))]
    lines = [f"Object: {describe(s)}\nClass: {of_shape[s]}" for s in shapes]
    turns = []
    for shape in rng.sample(_SHAPES, TURNS):
        text = f"Which class has this object: {describe(shape)}? Answer with the class only."
        turns.append(_turn(text, of_shape[shape], 12))
    return "Learn from these examples.\n\n" + "\n\n".join(lines) + "\n\n", turns


def summaries(rng: random.Random, size: int) -> tuple[str, list[Turn]]:
    """Numbered articles; how well a summary of one overlaps with that article's first sentences."""
    documents = [d for d in sources.squad() if len(d.text) > 300]
    chosen = rng.sample(documents, min(len(documents), max(TURNS, size // 12)))
    context = "\n\n".join(f"Article {i}:\n{d.text}" for i, d in enumerate(chosen, 1))
    turns = []
    for number in rng.sample(range(len(chosen)), TURNS):
        sentences = re.split(r"(?<=[.!?])\s+", chosen[number].text)
        reference = " ".join(sentences[:2])
        text = f"Summarise article {number + 1} in one or two sentences."
        turns.append(
            Turn(
                text=text,
                gold=reference,
                answers=[[reference]],
                max_new_tokens=72,
                metric="overlap",
            )
        )
    return f"Read these articles.\n\n{context}\n\n", turns


BUILDERS: dict[str, Builder] = {
    "key_values": key_values,
    "needles": needles,
    "passages": passages,
    "many_shot": many_shot,
    "summaries": summaries,
}


def _turn(text: str, answers: str | list[str], max_new_tokens: int) -> Turn:
    alternatives = [answers] if isinstance(answers, str) else answers
    return Turn(
        text=text, gold=alternatives[0], answers=[alternatives], max_new_tokens=max_new_tokens
    )


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
