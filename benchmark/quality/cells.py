"""From records to cells: one configuration on one data set, compared with full attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from benchmark.quality.records import Record
from benchmark.quality.statistics import Estimate, bootstrap

FULL = "full"
# Tasks on which full attention scores less say nothing about what selection loses.
LEAST_FULL = 0.30


@dataclass(frozen=True)
class CellKey:
    """``mode`` is empty for single prompts."""

    model: str
    data: str
    mode: str
    config: str


@dataclass(frozen=True)
class Cell:
    """A configuration's accuracy over the samples that it and full attention answered.

    Attributes
    ----------
    num_samples : of the tasks that count
    accuracy, full : means over the tasks that count, in points
    difference : of ``accuracy`` and ``full`` over the same samples
    kept : mean share of tokens in the decode views of prompts that were selected from
    memory : share of slots that stayed on the device, where sessions were pruned
    by_task : points of every task, those that do not count included
    by_turn : points of every turn of conversations
    seconds, cached : time of all batches, and share of the prompts' tokens found in the cache
    """

    key: CellKey
    num_samples: int
    accuracy: Estimate
    full: float
    difference: Estimate
    kept: float | None
    dropped: float | None
    memory: float | None
    by_task: dict[str, float]
    by_turn: dict[str, float]
    seconds: float
    cached: float


def cells(records: Iterable[Record]) -> list[Cell]:
    """Cells in the order in which they were measured; those without full attention are left out."""
    answers: dict[CellKey, dict[tuple[str, int], Record]] = defaultdict(dict)
    times: dict[CellKey, list[Record]] = defaultdict(list)
    for record in records:
        key = CellKey(
            record["model"], record["data"], record.get("mode", ""), record.get("config", "")
        )
        if record["kind"] in ("answer", "turn"):
            answers[key][record["sample"], record.get("turn", 0)] = record
        elif record["kind"] == "time":
            times[key].append(record)
    found = []
    for key, mine in answers.items():
        full = answers.get(CellKey(key.model, key.data, key.mode, FULL), {})
        if cell := _cell(key, mine, full, times[key]):
            found.append(cell)
    return found


def _cell(
    key: CellKey,
    mine: dict[tuple[str, int], Record],
    full: dict[tuple[str, int], Record],
    times: list[Record],
) -> Cell | None:
    counting = _counting_tasks(full)
    common = [k for k in mine if k in full and mine[k]["task"] in counting]
    if not common:
        return None
    tasks = [mine[k]["task"] for k in common]
    scores = [mine[k]["score"] for k in common]
    reference = [full[k]["score"] for k in common]
    lost = [a - b for a, b in zip(scores, reference, strict=True)]
    all_records = list(mine.values())
    prompt = sum(r["prompt"] for r in all_records)
    return Cell(
        key=key,
        num_samples=len(common),
        accuracy=bootstrap(scores, tasks),
        full=bootstrap(reference, tasks).mean,
        difference=bootstrap(lost, tasks),
        kept=_mean([r["kept"] for r in all_records if "kept" in r]),
        dropped=_mean([r["dropped"] for r in all_records if "dropped" in r]),
        memory=_mean([t["memory"] for t in times if "memory" in t]),
        by_task=_points(all_records, "task"),
        by_turn=_points([r for r in all_records if "turn" in r and r["task"] in counting], "turn"),
        seconds=sum(t["seconds"] for t in times),
        cached=sum(r["cached"] for r in all_records) / prompt if prompt else 0.0,
    )


def _counting_tasks(full: dict[tuple[str, int], Record]) -> set[str]:
    points = _points(list(full.values()), "task")
    return {task for task, value in points.items() if value >= 100 * LEAST_FULL}


def _points(records: list[Record], field: str) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for record in records:
        groups[str(record[field])].append(record["score"])
    return {name: 100 * float(np.mean(scores)) for name, scores in sorted(groups.items())}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
