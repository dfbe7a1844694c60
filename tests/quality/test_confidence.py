"""The table of ``min_confidence`` as served."""

from __future__ import annotations

from typing import Any

from benchmark.quality.confidence import ROWS, confidence_table
from benchmark.quality.ladder import served
from tests.quality.test_report import SERVED, answer


def name_of(ratio: float, confidence: float | None) -> str:
    name = SERVED.replace("k39", f"k{100 * ratio:.0f}")
    return name if confidence is None else f"{name} sure{100 * confidence:.0f}"


def some_records(model: str, right: dict[tuple[float, float | None], float]) -> list[Any]:
    records = []
    for number in range(10):
        records.append(answer("full", "easy", number, 1.0))
        for row in ROWS:
            score = float(number < 10 * right.get(row, 1.0))
            kept = row[0] if row[1] is None else 0.3
            records.append(answer(name_of(*row), "easy", number, score, kept=kept, dropped=0.0))
    return [record | {"model": model} for record in records]


def test_names_tell_ratio_and_confidence() -> None:
    assert served(SERVED) == (0.39, None)
    assert served(SERVED.replace("k39", "k32") + " sure35") == (0.32, 0.35)
    assert served(SERVED.replace("window128", "window64")) is None


def test_rows_are_compared_on_the_same_questions() -> None:
    records = some_records("m", {(0.25, None): 0.5, (0.39, 0.7): 0.9})
    records += some_records("n", {(0.25, None): 0.7, (0.39, 0.7): 0.9})
    # Not asked in every way, and a task that full attention does not solve: count nowhere.
    records.append(answer("full", "easy", 99, 1.0))
    records.append(answer(SERVED, "easy", 99, 0.0, kept=0.39, dropped=0.0))
    records += [r | {"task": "hard", "score": 0.0, "sample": f"h{r['sample']}"} for r in records]
    lines = [line.strip("| ").split(" | ") for line in confidence_table(records).split("\n")]
    rows = {(line[0], line[2]): line[3:] for line in lines[2:]}
    assert {line[1] for line in lines[2:]} == {"10", "20"}
    assert rows["m", "25 %"][1].startswith("-50.0 [")
    careful = rows["all", "20 %, 39 % below 0.7"]
    assert careful[0] == "30.0" and careful[1].startswith("-10.0 [")
    assert careful[2].startswith("30.0 [") and careful[4].startswith("-10.0 [")


def test_nothing_where_nothing_was_asked_in_every_way() -> None:
    assert confidence_table([answer("full", "easy", 0, 1.0)]).startswith("_")
