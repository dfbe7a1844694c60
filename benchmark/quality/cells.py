"""From records to cells: one configuration on one data set, compared with full attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from benchmark.quality.conversations import MODES
from benchmark.quality.records import Record
from benchmark.quality.statistics import Estimate, bootstrap

FULL = "full"
# Tasks on which full attention scores less say nothing about what selection loses.
LEAST_FULL = 0.30
# Modes in which full attention, whose prefixes are never pruned, does what it does by turns.
SHRINKING = frozenset(name for name, mode in MODES.items() if mode.shrink)

# A sample and the turn of its conversation.
Question = tuple[str, int]
# Number of the process that measured, in the order of the records.
Run = int


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
    num_samples : of the tasks that count; a sample measured in several runs counts once, with the
        mean of its scores
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


@dataclass
class _Answers:
    """What one configuration answered: all records, by question and run."""

    by_run: dict[Question, dict[Run, Record]] = field(default_factory=dict)

    def add(self, run: Run, record: Record) -> None:
        question = record["sample"], record.get("turn", 0)
        self.by_run.setdefault(question, {})[run] = record

    @property
    def latest(self) -> dict[Question, Record]:
        """The latest answer to every question."""
        return {question: runs[max(runs)] for question, runs in self.by_run.items()}

    def beside(self, other: _Answers) -> Iterator[tuple[list[Record], list[Record]]]:
        """Answers of both to every question that both answered.

        Those of the runs in which both did: two GPUs round differently, and so may one with other
        prompts in the batch. Where there is no such run, the latest of each.
        """
        for question, mine in self.by_run.items():
            theirs = other.by_run.get(question)
            if theirs is None:
                continue
            if common := mine.keys() & theirs.keys():
                yield [mine[run] for run in common], [theirs[run] for run in common]
            else:
                yield [mine[max(mine)]], [theirs[max(theirs)]]


def cells(records: Iterable[Record]) -> list[Cell]:
    """Cells in the order in which they were measured; those without full attention are left out.

    Records follow the ``run`` record of the process that measured them.
    """
    answers: dict[CellKey, _Answers] = defaultdict(_Answers)
    times: dict[CellKey, list[Record]] = defaultdict(list)
    run = 0
    for record in records:
        key = CellKey(
            record["model"], record["data"], record.get("mode", ""), record.get("config", "")
        )
        if record["kind"] == "run":
            run += 1
        elif record["kind"] in ("answer", "turn"):
            answers[key].add(run, record)
        elif record["kind"] == "time":
            times[key].append(record)
    found = []
    for key, mine in answers.items():
        mode = "turns" if key.mode in SHRINKING else key.mode
        full = answers.get(CellKey(key.model, key.data, mode, FULL), _Answers())
        if cell := _cell(key, mine, full, times[key]):
            found.append(cell)
    return found


def _cell(key: CellKey, mine: _Answers, full: _Answers, times: list[Record]) -> Cell | None:
    counting = _counting_tasks(full.latest)
    tasks, scores, reference = [], [], []
    for answers, complete in mine.beside(full):
        if answers[0]["task"] in counting:
            tasks.append(answers[0]["task"])
            scores.append(_score(answers))
            reference.append(_score(complete))
    if not tasks:
        return None
    lost = [a - b for a, b in zip(scores, reference, strict=True)]
    all_records = list(mine.latest.values())
    prompt = sum(r["prompt"] for r in all_records)
    return Cell(
        key=key,
        num_samples=len(tasks),
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


def _score(answers: list[Record]) -> float:
    return float(np.mean([answer["score"] for answer in answers]))


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
