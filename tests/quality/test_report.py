"""From records to cells, tables and the page."""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark.quality import report
from benchmark.quality.cells import cells
from benchmark.quality.ladder import ladder_table, sure_table
from benchmark.quality.report import books, errors, fill, load_records
from benchmark.quality.statistics import bootstrap
from benchmark.quality.tables import NOTHING, lost_table, task_table

SERVED = "tca p39 k39 every4096 tail512 first16 latest8 window128 calibrated"


def answer(config: str, task: str, number: int, score: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "answer",
        "model": "m",
        "data": "ruler-8192",
        "config": config,
        "sample": f"{task}/{number}",
        "task": task,
        "score": score,
        "prompt": 100,
        "cached": 50,
        **more,
    }


def some_records() -> list[dict[str, Any]]:
    records = []
    for number in range(10):
        records += [
            answer("full", "easy", number, 1.0),
            answer("full", "hard", number, 0.5),
            answer("full", "hopeless", number, 0.1),
            answer(
                SERVED,
                "easy",
                number,
                1.0,
                kept=0.4,
                dropped=0.02,
            ),
            answer(
                SERVED,
                "hard",
                number,
                float(number < 3),
                kept=0.4,
                dropped=0.02,
            ),
            answer(
                SERVED,
                "hopeless",
                number,
                1.0,
                kept=0.4,
                dropped=0.02,
            ),
        ]
    records.append(answer(SERVED, "hard", 99, 1.0, kept=0.4))
    records.append(answer("streaming p100 k39", "easy", 0, 0.0, kept=0.4))
    time = {"kind": "time", "model": "m", "data": "ruler-8192", "config": "full", "seconds": 2.5}
    return [{"kind": "run", "model": "m", "data": ""}, *records, time, time]


def test_cells_compare_answers_of_one_run_where_they_can() -> None:
    run, tca = {"kind": "run", "model": "m", "data": ""}, "tca p15 k39"
    first = [run, answer("full", "easy", 0, 1.0), answer(tca, "easy", 0, 1.0)]
    second = [run, answer("full", "easy", 0, 0.5), answer(tca, "easy", 1, 0.0)]
    third = [run, answer("full", "easy", 1, 1.0)]
    _, sparse = cells([*first, *second, *third])
    # The first question was answered in the first run by both, the second only apart.
    assert sparse.full == pytest.approx(100) and sparse.difference.mean == pytest.approx(-50)


def test_cells_average_the_runs_in_which_both_answered() -> None:
    run, tca = {"kind": "run", "model": "m", "data": ""}, "tca p15 k39"
    both = [[run, answer("full", "easy", 0, 1.0), answer(tca, "easy", 0, s)] for s in (1.0, 0.0)]
    _, sparse = cells([*both[0], *both[1], run, answer("full", "easy", 0, 0.5)])
    assert sparse.num_samples == 1 and sparse.full == pytest.approx(100)
    assert sparse.difference.mean == pytest.approx(-50)


def test_modes_that_shrink_prefixes_are_compared_with_full_attention_by_turns() -> None:
    def turn(config: str, mode: str, score: float) -> dict[str, Any]:
        return answer(config, "easy", 0, score, kind="turn", mode=mode, turn=0)

    records = [turn("full", "turns", 1.0), turn("tca p15 k39", "core", 0.5)]
    _, core = cells([*records, turn("full", "core", 0.4)])[:2]
    assert core.key.mode == "core" and core.difference.mean == pytest.approx(-50)


def test_cells_compare_the_same_samples_of_tasks_that_count() -> None:
    full, sparse, streaming = cells(some_records())
    assert full.accuracy.mean == pytest.approx(75) and full.difference.mean == 0
    assert full.seconds == 5.0
    # Task means 1.0 and 0.3; what full attention cannot do and did not answer is left out.
    assert sparse.num_samples == 20
    assert sparse.accuracy.mean == pytest.approx(65)
    assert sparse.difference.mean == pytest.approx(-10)
    assert sparse.difference.low < -10 < sparse.difference.high <= 5
    assert sparse.by_task["hopeless"] == 100
    assert sparse.kept == pytest.approx(0.4) and sparse.cached == 0.5
    assert (streaming.num_samples, streaming.full) == (1, 100)


def test_nothing_without_full_attention() -> None:
    assert cells([answer(SERVED, "easy", 0, 1.0)]) == []


def test_intervals_hold_what_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        values = rng.random(60) < 0.7
        found = bootstrap(values.astype(float), ["a"] * 30 + ["b"] * 30, seed)
        hits += found.low <= 70 <= found.high
    assert 86 <= hits <= 100


def test_the_page_is_filled_between_its_marks() -> None:
    page = "Text\n<!-- begin headline -->\nold\n<!-- end headline -->\nMore\n"
    page += "<!-- begin books --><!-- end books -->\n<!-- begin tasks -->\n<!-- end tasks -->\n"
    records = some_records()
    others = {"books": "no books"}
    filled = fill(page, cells(records), others)
    assert filled.startswith("Text\n<!-- begin headline -->\n| model |")
    assert f"| m | ruler-8192 | `{SERVED}` | 20 | 40.0 | 65.0 [" in filled
    assert "old" not in filled and "streaming" not in filled and "\nMore\n" in filled
    assert "| hopeless | 10 | 100 |" in filled
    assert "<!-- begin books -->\nno books\n<!-- end books -->" in filled
    assert fill(filled, cells(records), others) == filled
    assert NOTHING in fill(page, [], others)
    with pytest.raises(ValueError, match="nonsense"):
        fill("<!-- begin nonsense --><!-- end nonsense -->", [], {})


def test_tasks_that_a_configuration_lacks_stay_empty() -> None:
    lines = task_table(cells(some_records())).splitlines()
    assert lines[0] == f"| task | `full` | `{SERVED}` | `streaming p100 k39` |"
    assert lines[2] == "| easy | 100 | 100 | 0 |"
    assert lines[3] == "| hard | 50 | 36 |  |"


def test_losses_stand_side_by_side() -> None:
    lines = lost_table(cells(some_records())).splitlines()
    assert lines[0] == "| configuration | m ruler-8192 |"
    assert lines[2].startswith(f"| `{SERVED}` | -10.0 [") and lines[2].endswith("] (20) |")
    assert "full" not in "".join(lines[2:])


def test_the_ladder_takes_the_smallest_ratio_within_a_limit() -> None:
    """Ratios that keep more drop less; half of the questions need 20 %, half 50 %."""
    records = []
    for number in range(20):
        needs = 20 if number % 2 else 50
        records.append(answer("full", "easy", number, 1.0))
        for ratio, dropped in ((10, 0.095), (20, 0.065), (30, 0.045), (39, 0.035), (50, 0.025)):
            config = SERVED.replace("k39", f"k{ratio}")
            score = float(ratio >= needs)
            records.append(answer(config, "easy", number, score, kept=ratio / 100, dropped=dropped))
    # Not asked at every ratio: counts nowhere.
    records += [answer("full", "easy", 99, 1.0), answer(SERVED, "easy", 99, 0.0, kept=0.39)]
    rows = {
        line.split(" | ")[2]: line.split(" | ")[3:] for line in ladder_table(records).split("\n")
    }
    assert rows["39 %"][0] == "39.0" and rows["39 %"][1].startswith("-50.0 [")
    assert rows["at most 5 % dropped"] == rows["30 %"]
    assert rows["at most 2 % dropped"] == rows["50 %"], "no ratio is within the limit"
    assert rows["the least that answers as well"][0] == "35.0"
    assert rows["the least that answers as well"][1].startswith("0.0 [")


def test_who_is_not_sure_reads_more() -> None:
    """Of two models; a question that needs more than a fifth is answered without confidence."""
    records = []
    for model in ("m", "n"):
        for number in range(20):
            needs = 10 if number % 2 else 39
            records.append(answer("full", "easy", number, 1.0) | {"model": model})
            for ratio in (10, 15, 20, 32, 39):
                found = answer(
                    SERVED.replace("k39", f"k{ratio}"),
                    "easy",
                    number,
                    float(ratio >= needs),
                    kept=ratio / 100,
                    dropped=0.05,
                )
                records.append(found | {"model": model, "sure": 0.9 if ratio >= needs else 0.55})
    # Says nothing of how sure it was.
    records.append(answer(SERVED, "easy", 99, 0.0, kept=0.39, dropped=0.05))
    cells_of = [line.strip("| ").split(" | ") for line in sure_table(records).split("\n")]
    rows = {(row[0], row[2]): row[3:] for row in cells_of}
    assert rows["m", "20 %"][0] == "20.0" and rows["m", "20 %"][2].startswith("-50.0 [")
    careless, careful = (f"20 %, and 39 % where less sure than {p}" for p in (0.5, 0.6))
    assert rows["all", careless] == rows["all", "20 %"]
    assert rows["all", careful] == ["29.5", "0.0 [0.0, 0.0]", "0.0 [0.0, 0.0]"]
    assert ("all", "40") in {(row[0], row[1]) for row in cells_of}


def test_books_have_a_row_per_configuration() -> None:
    shared = {"kind": "likelihood", "model": "m", "data": "books-8192", "config": "full"}
    records = [{**shared, "nll": n, "agree": 1.0, "kl": 0.0, "same": 64} for n in (1.0, 3.0)]
    assert f"| m | books-8192 | `full` | 2 |  | {np.exp(2):.3f} | 100.0 | 0.0000 | 64.0 |" in books(
        records
    )


def test_errors_show_a_few_layers(tmp_path: Path) -> None:
    assert errors(tmp_path) == NOTHING
    layer = {"dropped_mass": 0.02, "error": 0.1, "diameter": 0.5, "theorem": 0.9}
    layers = [{**layer, "worst_ratio": 0.4, "accumulated": 0.01 * i} for i in range(24)]
    found = {"model": "m", "configurations": {"tca p100 k39": layers}}
    (tmp_path / "errors-m.json").write_text(json.dumps(found))
    rows = errors(tmp_path).splitlines()
    assert len(rows) == 2 + 6
    assert rows[2].startswith("| m | `tca p100 k39` | 0 | 2.00 | 0.100 | 0.500 | 0.900 | 0.400 |")
    assert rows[-1].endswith("| 0.230 |")


def test_report_writes_page_images_and_summary(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "quality.md"
    results.mkdir()
    records = some_records()
    text = "".join(json.dumps(r) + "\n" for r in records)
    (results / "a.jsonl").write_text(text[: len(text) // 2] + "\n")
    with lzma.open(results / "b.jsonl.xz", "wt") as file:
        file.write(text)
    page.write_text("<!-- begin headline -->\n<!-- end headline -->\n")
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    where = ["--results", str(results), "--page", str(page), "--images", str(tmp_path / "i")]
    report.run(parser.parse_args(where))
    assert "65.0" in page.read_text()
    summary = json.loads((results / "summary.json").read_text())
    assert [c["key"]["config"] for c in summary][:2] == [
        "full",
        SERVED,
    ]
    assert (tmp_path / "i" / "quality_m_ruler-8192.png").stat().st_size > 5000
    assert len(load_records(results)) > len(records)
