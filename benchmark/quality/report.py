"""``report``: tables and plots of docs/quality.md from the records of all runs.

The page's text is written by hand; what stands between ``<!-- begin NAME -->`` and
``<!-- end NAME -->`` is written anew. Also writes summary.json beside the records.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmark.quality.cells import Cell, cells
from benchmark.quality.confidence import confidence_table
from benchmark.quality.ladder import ladder_table, sure_table
from benchmark.quality.records import Record, read
from benchmark.quality.sections import SECTIONS
from benchmark.quality.tables import ALL_COLUMNS, NOTHING, markdown, number, table

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmark" / "results" / "quality"
PAGE = ROOT / "docs" / "quality.md"
IMAGES = ROOT / "docs" / "images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the records")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--print", action="store_true", help="print all cells and write nothing")


def run(args: argparse.Namespace) -> None:
    """Write the page, its images and the summary."""
    records = load_records(args.results)
    found = cells(records)
    if args.print:
        print(table(found, ALL_COLUMNS))
        return
    summary = [dataclasses.asdict(cell) for cell in found]
    path = args.results / "summary.json"
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    page = args.page.read_text(encoding="utf-8")
    others = {
        "books": books(records),
        "errors": errors(args.results),
        "ladder": ladder_table(records),
        "sure": sure_table(told := load_records(args.results / "sure")),
        "confidence": confidence_table([*told, *records]),
    }
    args.page.write_text(fill(page, found, others), encoding="utf-8")
    from benchmark.quality.plots import draw

    draw(found, args.images)


def load_records(directory: Path) -> list[Record]:
    """All records of a directory's ``.jsonl`` and ``.jsonl.xz`` files, by file name."""
    records: list[Record] = []
    for path in sorted(directory.glob("*.jsonl*")):
        if path.suffix == ".xz":
            with lzma.open(path, "rt", encoding="utf-8") as file:
                records += [json.loads(line) for line in file if line.strip()]
        else:
            records += read(path)
    return records


def books(records: Sequence[Record]) -> str:
    """Likelihoods: one row per model, data set and configuration."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record["kind"] == "likelihood":
            groups[record["model"], record["data"], record["config"]].append(record)
    if not groups:
        return NOTHING
    head = ["model", "data", "configuration", "passages", "kept %", "perplexity", "agree %", "KL"]
    lines = [[*head, "same of 64"], ["---"] * (len(head) + 1)]
    for (model, data, config), members in groups.items():

        def mean(field: str, members: list[Record] = members) -> float:
            return float(np.mean([m[field] for m in members if field in m]))

        kept = f"{100 * mean('kept'):.1f}" if "kept" in members[0] else ""
        lines.append([model, data, f"`{config}`", str(len(members)), kept])
        lines[-1] += [f"{np.exp(mean('nll')):.3f}", f"{100 * mean('agree'):.1f}"]
        lines[-1] += [f"{mean('kl'):.4f}", f"{mean('same'):.1f}"]
    return markdown(lines)


def errors(directory: Path) -> str:
    """Attention errors beside their bounds: a few layers of every ``errors-*.json``."""
    head = ["model", "configuration", "layer", "dropped mass %", "error", "g diam(V)"]
    lines = [[*head, "2 g max\\|V\\|", "worst error / bound", "accumulated"]]
    lines.append(["---"] * len(lines[0]))
    for path in sorted(directory.glob("errors-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for config, layers in found["configurations"].items():
            for index in sorted({round(i * (len(layers) - 1) / 5) for i in range(6)}):
                layer = layers[index]
                fields = ("error", "diameter", "theorem", "worst_ratio", "accumulated")
                row = [found["model"], f"`{config}`", str(index)]
                row.append(f"{100 * layer['dropped_mass']:.2f}")
                lines.append([*row, *(number(layer.get(field), 3) for field in fields)])
    if len(lines) == 2:
        return NOTHING
    return markdown(lines)


def fill(page: str, found: Sequence[Cell], others: Mapping[str, str]) -> str:
    """The page with every section's table written anew.

    ``others``: finished text of sections that are no cells.

    Raises
    ------
    ValueError
        When the page names a section that does not exist.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name in others:
            return f"<!-- begin {name} -->\n{others[name]}\n<!-- end {name} -->"
        if name not in SECTIONS:
            raise ValueError(f"the page has an unknown section {name!r}")
        text = SECTIONS[name].show(found)
        return f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->"

    pattern = r"<!-- begin ([\w-]+) -->.*?<!-- end \1 -->"
    return re.sub(pattern, replaced, page, flags=re.DOTALL)
