"""Books: what selection does to the next token's distribution, beside full attention."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from benchmark.quality import sources
from benchmark.quality.answers import OutOfTime, by_prefill, selection_report
from benchmark.quality.configurations import Configuration
from benchmark.quality.lab import Ask, Lab, Reply
from benchmark.quality.progress import bar
from benchmark.quality.records import Record, Records
from tca_runtime.messages import LogprobOptions

BOOKS = (
    "austen-emma",
    "austen-persuasion",
    "chesterton-ball",
    "chesterton-brown",
    "edgeworth-parents",
    "melville-moby_dick",
)
# Predicted tokens at the end of a passage, tokens generated instead of them, and of how many of
# full attention's likeliest tokens the distributions are compared.
PREDICTED, GENERATED, TOP = 256, 64, 32
# A token that another configuration does not have among this many counts as unlikely as its last.
OTHER_TOP = 128

Ranked = list[tuple[float, int]]


class Passage(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of a book, a little longer than ``length`` tokens."""

    id: str
    length: int
    text: str


def passages(length: int, count: int, seed: int) -> Iterator[Passage]:
    """Stretches of the books in turn, from random places."""
    for number in range(count):
        name = BOOKS[number % len(BOOKS)]
        rng = random.Random(f"{seed}/{name}/{length}/{number}")
        text = sources.book(name)
        # No tokenizer needs more than six characters of prose for a token.
        size = 6 * length
        begin = rng.randrange(max(1, len(text) - size))
        yield Passage(
            id=f"{name}/{length}/{seed}/{number}", length=length, text=text[begin : begin + size]
        )


def divergence(mine: Ranked, full: Ranked) -> float:
    """KL from full attention's distribution over its likeliest tokens and all others as one."""
    known = {token: logprob for logprob, token in mine}
    least = min(known.values())
    total, mass, other_mass = 0.0, 0.0, 0.0
    for logprob, token in full[:TOP]:
        p, q = math.exp(logprob), math.exp(known.get(token, least))
        total += p * (logprob - math.log(q))
        mass += p
        other_mass += q
    rest, other_rest = max(1 - mass, 1e-9), max(1 - other_mass, 1e-9)
    return max(0.0, total + rest * math.log(rest / other_rest))


def run_likelihood(
    lab: Lab,
    tokenizer: Any,
    texts: Sequence[Passage],
    configurations: Sequence[Configuration],
    records: Records,
    labels: dict[str, str],
    deadline: float = float("inf"),
) -> None:
    """Measure what is missing in ``records``; full attention is computed again for comparison.

    Raises
    ------
    OutOfTime
        When the deadline (``time.monotonic``) has passed.
    """
    length = max(text.length for text in texts)
    full = Configuration.parse("full")
    others = [c.at_length(length) for c in configurations if c.name != full.name]
    at_once = max(1, int(lab.capacity * 0.8) // length)
    progress = bar(len(texts) * (1 + len(others)), labels["data"])
    for begin in range(0, len(texts), at_once):
        batch = texts[begin : begin + at_once]
        ids = {t.id: tokenizer.backend_tokenizer.encode(t.text).ids[:length] for t in batch}
        reference: dict[str, tuple[Reply, Reply]] | None = None
        for configuration in by_prefill([full, *others]):
            names = {**labels, "config": configuration.name}
            missing = {
                name: tokens
                for name, tokens in ids.items()
                if not records.has(kind="likelihood", sample=name, **names)
            }
            progress.update(len(ids) - len(missing))
            is_full = configuration.name == full.name
            if not missing and not (is_full and _is_wanted(others, ids, records, labels)):
                continue
            if time.monotonic() > deadline:
                raise OutOfTime
            progress.set_description(f"{labels['data']} {configuration.name}")
            lab.use(configuration)
            replies = _measure(lab, ids if is_full else missing)
            if is_full:
                reference = replies
            assert reference is not None
            records.add(
                _record(name, length, replies[name], reference[name], names) for name in missing
            )
            progress.update(len(missing))
    progress.close()


def _is_wanted(
    others: Sequence[Configuration],
    ids: dict[str, list[int]],
    records: Records,
    labels: dict[str, str],
) -> bool:
    return not all(
        records.has(kind="likelihood", sample=name, config=other.name, **labels)
        for other in others
        for name in ids
    )


def _measure(lab: Lab, ids: dict[str, list[int]]) -> dict[str, tuple[Reply, Reply]]:
    """Of every passage: logprobs of its end, and what is generated in its place."""
    predicted = lab.generate(
        [
            Ask(name, tokens, 0, logprobs=LogprobOptions(len(tokens) - PREDICTED, OTHER_TOP))
            for name, tokens in ids.items()
        ]
    )
    written = lab.generate(
        [Ask(name, tokens[:-PREDICTED], GENERATED) for name, tokens in ids.items()]
    )
    return {name: (predicted[name], written[name]) for name in ids}


def _record(
    name: str,
    length: int,
    mine: tuple[Reply, Reply],
    full: tuple[Reply, Reply],
    labels: dict[str, str],
) -> Record:
    targets, tops = _distributions(mine[0])
    _, full_tops = _distributions(full[0])
    pairs = list(zip(tops, full_tops, strict=True))
    same = 0
    for token, other in zip(mine[1].ids, full[1].ids, strict=False):
        if token != other:
            break
        same += 1
    return {
        "kind": "likelihood",
        **labels,
        "sample": name,
        "length": length,
        "nll": round(-sum(targets) / len(targets), 6),
        "agree": round(sum(a[0][1] == b[0][1] for a, b in pairs) / len(pairs), 5),
        "kl": round(sum(divergence(a, b) for a, b in pairs) / len(pairs), 7),
        "same": same,
        "generated": len(full[1].ids),
        **selection_report(mine[1].tca),
    }


def _distributions(reply: Reply) -> tuple[list[float], list[Ranked]]:
    """Logprobs of the predicted tokens, and the likeliest tokens of each position."""
    output = next(o for o in reply.outputs if o.input_logprobs is not None)
    assert output.input_logprobs is not None and output.input_top_logprobs is not None
    targets = [logprob for logprob, _ in output.input_logprobs if logprob is not None]
    tops = [
        [(logprob, token) for logprob, token in top if logprob is not None]
        for top in output.input_top_logprobs.positions
        if top is not None
    ]
    return targets, tops
