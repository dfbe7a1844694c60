"""``min_confidence`` as served, beside fixed ratios on the same questions.

Where ``ladder.sure_table`` takes one of two answers, here the server answered: it withdrew the
token, let the last ones see everything, drew again and selected with the larger ratio.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from benchmark.quality.cells import FULL, LEAST_FULL
from benchmark.quality.ladder import percent, served
from benchmark.quality.records import Record
from benchmark.quality.statistics import bootstrap
from benchmark.quality.tables import NOTHING, markdown
from tca_runtime.sparsity.chooser import LITTLE

# Kept ratio and ``min_confidence``: fixed ones, then those that were asked everywhere.
ROWS: tuple[tuple[float, float | None], ...] = (
    (0.2, None),
    (0.25, None),
    (0.32, None),
    (0.39, None),
    (0.32, 0.35),
    (0.39, 0.35),
    (0.39, 0.5),
    (0.39, 0.7),
    (0.5, 0.35),
    (0.5, 0.7),
)
# Fixed ratios that the others are compared with.
BESIDE = ((0.25, None), (0.32, None), (0.39, None))

Question = tuple[str, str, str, str, int]
Row = tuple[float, float | None]


def confidence_table(records: Iterable[Record]) -> str:
    """Markdown: what is kept and lost, over the questions that were answered in every way."""
    full: dict[Question, Record] = {}
    answers: dict[Row, dict[Question, Record]] = defaultdict(dict)
    for record in records:
        if record["kind"] not in ("answer", "turn"):
            continue
        where = record["model"], record["data"], record.get("mode", "")
        question = (*where, record["sample"], record.get("turn", 0))
        if record["config"] == FULL:
            full[question] = record
        elif (found := served(record["config"])) is not None and found[0] is not None:
            answers[found[0], found[1]][question] = record
    asked = [q for q in full if all(q in answers[row] for row in ROWS)]
    tasks: dict[str, list[Question]] = defaultdict(list)
    for question in asked:
        tasks[" ".join((*question[:3], full[question]["task"]))].append(question)
    counting = {
        name: members
        for name, members in tasks.items()
        if np.mean([full[question]["score"] for question in members]) >= LEAST_FULL
    }
    if not counting:
        return NOTHING
    head = ["model", "questions", "what is kept", "kept %", "minus full"]
    head += [f"minus {percent(row[0])}" for row in BESIDE]
    lines = [head, ["---"] * len(head)]
    models = sorted({question[0] for question in chain(*counting.values())})
    for model in [*models, "all"] if len(models) > 1 else models:
        strata, members = [], []
        for name, questions in counting.items():
            if model in ("all", questions[0][0]):
                members += questions
                strata += [name] * len(questions)
        for row in ROWS:
            lines.append(_line(model, row, members, strata, full, answers))
    return markdown(lines)


def _line(
    model: str,
    row: Row,
    questions: Sequence[Question],
    strata: Sequence[str],
    full: dict[Question, Record],
    answers: dict[Row, dict[Question, Record]],
) -> list[str]:
    mine = answers[row]

    def minus(others: dict[Question, Record]) -> str:
        return str(bootstrap([mine[q]["score"] - others[q]["score"] for q in questions], strata))

    kept = bootstrap([mine[q].get("kept", 1.0) for q in questions], strata)
    ratio, confidence = row
    name = (
        percent(ratio)
        if confidence is None
        else f"{percent(LITTLE)}, {percent(ratio)} below {confidence:g}"
    )
    lost = [minus(full), *(minus(answers[other]) for other in BESIDE)]
    return [model, str(len(questions)), name, f"{kept.mean:.1f}", *lost]
