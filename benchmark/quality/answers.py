"""Single prompts: every sample under every configuration, a batch of samples at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from benchmark.quality.configurations import Configuration
from benchmark.quality.lab import Ask, Lab
from benchmark.quality.progress import bar
from benchmark.quality.records import Record, Records
from benchmark.quality.samples import Sample, grade

# Characters of an output that a record keeps.
KEPT_OUTPUT = 160


class OutOfTime(Exception):
    """The time that a run was given is over; everything finished is on disk."""


def batches(samples: Sequence[Sample], tokens: int) -> list[list[Sample]]:
    """Consecutive samples whose prompts fit into ``tokens`` together."""
    found: list[list[Sample]] = [[]]
    room = tokens
    for sample in samples:
        if found[-1] and sample.length > room:
            found.append([])
            room = tokens
        found[-1].append(sample)
        room -= sample.length
    return found if found[0] else []


def by_prefill(configurations: Sequence[Configuration]) -> list[Configuration]:
    """In the order given, but those that share K and V side by side."""
    keys = list(dict.fromkeys(c.prefill_key for c in configurations))
    return sorted(configurations, key=lambda c: keys.index(c.prefill_key))


def run_answers(
    lab: Lab,
    tokenizer: Any,
    samples: Sequence[Sample],
    configurations: Sequence[Configuration],
    records: Records,
    labels: dict[str, str],
    deadline: float = float("inf"),
    max_batch_tokens: int = 1 << 20,
) -> None:
    """Measure what is missing in ``records``.

    Every configuration sees a batch of samples before the next batch begins: prompts are computed
    once for all configurations that share K and V, and a run that is cut off leaves cells over
    the same samples.

    Raises
    ------
    OutOfTime
        When the deadline (``time.monotonic``) has passed.
    """
    # A prompt that is evicted between two configurations would be computed again.
    room = min(int(lab.capacity * 0.9), max_batch_tokens)
    length = max(sample.length for sample in samples)
    configurations = [c.at_length(length) for c in configurations]
    progress = bar(len(samples) * len(configurations), labels["data"])
    for batch in batches(samples, room):
        for _, group in groupby(by_prefill(configurations), lambda c: c.prefill_key):
            for configuration in group:
                names = {**labels, "config": configuration.name}
                missing = [s for s in batch if not records.has(kind="answer", sample=s.id, **names)]
                progress.update(len(batch) - len(missing))
                if not missing:
                    continue
                if time.monotonic() > deadline:
                    raise OutOfTime
                progress.set_description(f"{labels['data']} {configuration.name}")
                lab.use(configuration)
                records.add(_measure(lab, tokenizer, missing, names, progress.update))
    progress.close()


def _measure(
    lab: Lab,
    tokenizer: Any,
    samples: Sequence[Sample],
    names: dict[str, str],
    tick: Callable[[], Any],
) -> list[Record]:
    backend = tokenizer.backend_tokenizer
    encoded = backend.encode_batch_fast([s.text for s in samples])
    asks = [Ask(s.id, e.ids, s.max_new_tokens) for s, e in zip(samples, encoded, strict=True)]
    begin = time.perf_counter()
    replies = lab.generate(asks, lambda rid: tick())
    seconds = time.perf_counter() - begin
    found: list[Record] = []
    for sample, ask in zip(samples, asks, strict=True):
        reply = replies[sample.id]
        text = tokenizer.decode(reply.ids, skip_special_tokens=True)
        found.append(
            {
                "kind": "answer",
                **names,
                "sample": sample.id,
                "task": sample.task,
                "length": sample.length,
                "score": round(grade(text, sample.answers, sample.metric), 4),
                "prompt": len(ask.ids),
                "cached": reply.cached_tokens,
                **selection_report(reply.tca),
                "sure": round(reply.sure, 3),
                "output": text[:KEPT_OUTPUT],
            }
        )
    found.append(
        {
            "kind": "time",
            **names,
            "samples": len(samples),
            "seconds": round(seconds, 3),
            "prompt": sum(len(ask.ids) for ask in asks),
            "cached": sum(reply.cached_tokens for reply in replies.values()),
            "generated": sum(len(reply.ids) for reply in replies.values()),
        }
    )
    return found


def selection_report(tca: dict[str, Any] | None) -> dict[str, float]:
    """Kept ratio and dropped mass of a reply; nothing where everything was kept."""
    if tca is None:
        return {}
    return {"kept": round(tca["kept_ratio"], 5), "dropped": round(tca["dropped_mass"], 5)}
