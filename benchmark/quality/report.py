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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmark.quality.cells import FULL, Cell, cells
from benchmark.quality.configurations import SHIPPED, Configuration
from benchmark.quality.conversations import MODES
from benchmark.quality.records import Record, read

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
    args.page.write_text(
        fill(page, found, {"books": books(records), "errors": errors(args.results)}),
        encoding="utf-8",
    )
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


EARLIER = "w512-0.95.json"
"""What ``calibrated`` stood for until 27 November 2026: a window of 512, 15 % in prefill views."""

NOTHING = "_Not measured yet._"

Column = tuple[str, Callable[[Cell], str]]


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


ACCURACY: Column = ("accuracy", lambda c: str(c.accuracy))
COLUMNS: tuple[Column, ...] = (
    ("configuration", lambda c: f"`{c.key.config}`"),
    ("samples", lambda c: str(c.num_samples)),
    ("kept %", lambda c: _number(None if c.kept is None else 100 * c.kept)),
    ACCURACY,
    ("minus full", lambda c: "" if c.key.config == FULL else str(c.difference)),
)
WHERE: tuple[Column, ...] = (
    ("model", lambda c: c.key.model),
    ("data", lambda c: c.key.data),
    ("mode", lambda c: c.key.mode),
)
MEMORY: Column = ("on device %", lambda c: _number(None if c.memory is None else 100 * c.memory))
DROPPED: Column = (
    "dropped mass %",
    lambda c: _number(None if c.dropped is None else 100 * c.dropped, 2),
)
TURNS: Column = ("by turn", lambda c: ", ".join(f"{v:.0f}" for v in c.by_turn.values()))
SECONDS: Column = ("seconds", lambda c: f"{c.seconds:.0f}")
ALL_COLUMNS = (*WHERE, *COLUMNS, MEMORY, DROPPED, TURNS, SECONDS)


def table(found: Sequence[Cell], columns: Sequence[Column]) -> str:
    """A Markdown table; columns that are empty everywhere are left out."""
    if not found:
        return NOTHING
    rows = [[text(cell) for _, text in columns] for cell in found]
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    lines = [[columns[i][0] for i in used], ["---"] * len(used)]
    lines += [[row[i] for i in used] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def task_table(found: Sequence[Cell]) -> str:
    """Tasks down, configurations across."""
    names = sorted({task for cell in found for task in cell.by_task})
    head = ["task", *(f"`{c.key.config}`" for c in found)]
    lines = [head, ["---"] * len(head)]
    for name in names:
        lines.append([name, *(_number(c.by_task.get(name), 0) for c in found)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: which cells, and how they are shown.

    ``wanted`` looks at the cell's configuration; sections of single prompts have no modes.
    """

    wanted: Callable[[Configuration], bool]
    columns: Sequence[Column] = (*WHERE, *COLUMNS)
    modes: frozenset[str] = frozenset({""})
    lengths: frozenset[str] = frozenset()
    by_task: bool = False

    def cells(self, found: Sequence[Cell]) -> list[Cell]:
        return [
            cell
            for cell in found
            if cell.key.mode in self.modes
            and (not self.lengths or cell.key.data in self.lengths)
            and self.wanted(Configuration.parse(cell.key.config))
        ]


def _is_plain(c: Configuration) -> bool:
    """The settings of the first runs: uniform budgets, no tail, a selection every 2048."""
    first = (c.probes, c.window, c.block, c.granularity, c.tail, c.refresh)
    return (
        first == (32, 512, 64, 2048, 0, 1024)
        and not c.options
        and c.max_dropped_mass is None
        and c.calibration is None
    )


def _is_served(c: Configuration) -> bool:
    """The settings a server has by default, and others it can have with the shipped budgets."""
    return c.policy == FULL or (_is_calibrated(c) and _is_current(c) and not _is_auto(c))


def _is_calibrated(c: Configuration) -> bool:
    """TCA with the budgets that come with the runtime, or came with it before."""
    return c.policy == "tca" and c.calibration in (SHIPPED, EARLIER)


def _is_current(c: Configuration) -> bool:
    """Tail, granularity and refreshes as a server has them by default."""
    now = (c.tail, c.granularity, c.first_refresh, c.refresh_probes)
    return now == (512, 4096, 16, 8)


def _is_auto(c: Configuration) -> bool:
    return c.max_dropped_mass is not None


def _is_part(c: Configuration) -> bool:
    """Differs in one thing from ``tca p100 k25`` or ``tca p15 k39`` with uniform budgets."""
    return c.policy == "tca" and c.first_refresh == 16 and c.calibration is None and not _is_auto(c)


def _is_peer(c: Configuration) -> bool:
    """Dense prefill, a window of 128 and the other settings as served."""
    plain = (c.window, c.block, c.sigma) == (128, 64, 2.0)
    plain = plain and c.calibration in (None, SHIPPED, EARLIER)
    few = c.probes == 32 or c.policy in ("h2o", "topk")
    return _is_dense(c) and _is_current(c) and plain and few and not c.options


def _is_first(c: Configuration) -> bool:
    return c.policy == FULL or (c.policy == "tca" and c.prefill == 0.15 and _is_plain(c))


def _is_dense(c: Configuration) -> bool:
    return c.policy != FULL and c.prefill == 1.0


RULER_DATA = frozenset(f"ruler-{n}" for n in (4096, 8000, 8192, 16384, 32000))
VIEWS_DATA = frozenset({"tune39-16384", "tune39-32000", "tune25-8192"})
TUNE_DATA = frozenset(f"tune-{n}" for n in (4096, 8192, 16384))

SECTIONS = {
    "peers": Section(lambda c: c.policy == FULL or _is_peer(c), lengths=frozenset({"ruler-8192"})),
    "parts": Section(_is_part, lengths=frozenset({"ruler-8192"})),
    "calibrations": Section(
        lambda c: c.calibration not in (None, SHIPPED, EARLIER) and c.kept is not None,
        lengths=RULER_DATA | {"tune25-8192", "sessions-8192"},
        modes=frozenset({"", "turns"}),
    ),
    "thresholds": Section(
        lambda c: c.calibration not in (None, SHIPPED, EARLIER) and c.kept is None,
        (*WHERE, *COLUMNS, SECONDS),
        lengths=RULER_DATA,
    ),
    "views": Section(
        lambda c: (c.policy, c.kept, c.first_refresh) in ((FULL, None, None), ("tca", 0.39, 16)),
        lengths=VIEWS_DATA,
    ),
    "refreshes": Section(
        lambda c: (
            c.policy == FULL
            or (
                (c.prefill, c.kept, c.calibration, c.tail) == (0.15, 0.39, EARLIER, 512)
                and c.granularity == 4096
            )
        ),
        lengths=frozenset({"ruler-8192", "ruler-16384"}),
    ),
    "headline": Section(_is_served, lengths=RULER_DATA),
    "tasks": Section(_is_served, lengths=frozenset({"ruler-8192"}), by_task=True),
    "first": Section(_is_first, lengths=RULER_DATA),
    "prefill": Section(
        lambda c: c.policy == "tca" and c.kept == 0.39 and _is_plain(c),
        lengths=frozenset({"ruler-8192"}),
    ),
    "policies": Section(
        lambda c: c.policy == FULL or (_is_dense(c) and _is_plain(c)), lengths=RULER_DATA
    ),
    "scores": Section(
        lambda c: _is_dense(c) and c.first_refresh is None and bool(c.options), lengths=RULER_DATA
    ),
    "probes": Section(
        lambda c: _is_dense(c) and c.first_refresh is None and c.probes != 32, lengths=RULER_DATA
    ),
    "windows": Section(
        lambda c: _is_dense(c) and c.first_refresh is None and c.window != 512, lengths=RULER_DATA
    ),
    "blocks": Section(
        lambda c: c.first_refresh is None and (c.block, c.sigma) != (64, 2.0), lengths=RULER_DATA
    ),
    "auto": Section(lambda c: c.max_dropped_mass is not None, (*WHERE, *COLUMNS, DROPPED)),
    "granularity": Section(
        lambda c: (
            c.prefill == 0.15
            and not c.tail
            and (c.granularity != 2048 or c.probes != 32 or bool(c.options))
        ),
        lengths=RULER_DATA,
    ),
    "tuning": Section(lambda c: True, lengths=TUNE_DATA),
    "quarter": Section(lambda c: True, lengths=frozenset({"tune25-8192"})),
    "short": Section(lambda c: True, lengths=frozenset({"gsm8k-2048", "mmlu-2048"})),
    "conversations": Section(
        lambda c: True, (*WHERE, *COLUMNS, TURNS), frozenset({"visible", "turns", "users"})
    ),
    "pressure": Section(
        lambda c: True,
        (*WHERE, *COLUMNS, MEMORY, TURNS),
        frozenset(MODES) - {"visible", "turns", "users"},
    ),
}


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
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def errors(directory: Path) -> str:
    """Attention errors beside their bounds: a few layers of every ``errors-*.json``."""
    head = ["model", "configuration", "layer", "dropped mass %", "error", "g diam(V)"]
    lines = [[*head, "2 g max\\|V\\|", "worst error / bound", "accumulated"]]
    lines.append(["---"] * len(lines[0]))
    for path in sorted(directory.glob("errors-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for config, layers in found["configurations"].items():
            for number in sorted({round(i * (len(layers) - 1) / 5) for i in range(6)}):
                layer = layers[number]
                fields = ("error", "diameter", "theorem", "worst_ratio", "accumulated")
                row = [found["model"], f"`{config}`", str(number)]
                row.append(f"{100 * layer['dropped_mass']:.2f}")
                lines.append([*row, *(_number(layer.get(field), 3) for field in fields)])
    if len(lines) == 2:
        return NOTHING
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
        section = SECTIONS[name]
        chosen = section.cells(found)
        if chosen and section.by_task:
            models = dict.fromkeys(cell.key.model for cell in chosen)
            text = "\n\n".join(
                f"{model}:\n\n{task_table([c for c in chosen if c.key.model == model])}"
                for model in models
            )
        else:
            text = table(chosen, section.columns)
        return f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->"

    pattern = r"<!-- begin ([\w-]+) -->.*?<!-- end \1 -->"
    return re.sub(pattern, replaced, page, flags=re.DOTALL)
