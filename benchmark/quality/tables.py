"""Cells as Markdown tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from benchmark.quality.cells import FULL, Cell

NOTHING = "_Not measured yet._"

Column = tuple[str, Callable[[Cell], str]]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of its lines' fields."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 1) -> str:
    """Empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


ACCURACY: Column = ("accuracy", lambda c: str(c.accuracy))
COLUMNS: tuple[Column, ...] = (
    ("configuration", lambda c: f"`{c.key.config}`"),
    ("samples", lambda c: str(c.num_samples)),
    ("kept %", lambda c: number(None if c.kept is None else 100 * c.kept)),
    ACCURACY,
    ("minus full", lambda c: "" if c.key.config == FULL else str(c.difference)),
)
WHERE: tuple[Column, ...] = (
    ("model", lambda c: c.key.model),
    ("data", lambda c: c.key.data),
    ("mode", lambda c: c.key.mode),
)
MEMORY: Column = ("on device %", lambda c: number(None if c.memory is None else 100 * c.memory))
DROPPED: Column = (
    "dropped mass %",
    lambda c: number(None if c.dropped is None else 100 * c.dropped, 2),
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
    return markdown(lines)


def task_table(found: Sequence[Cell]) -> str:
    """Tasks down, configurations across."""
    names = sorted({task for cell in found for task in cell.by_task})
    head = ["task", *(f"`{c.key.config}`" for c in found)]
    lines = [head, ["---"] * len(head)]
    for name in names:
        lines.append([name, *(number(c.by_task.get(name), 0) for c in found)])
    return markdown(lines)


def lost_table(found: Sequence[Cell]) -> str:
    """Configurations down, models and data sets across: points minus full, and samples."""
    places = list(dict.fromkeys((c.key.model, c.key.data) for c in found))
    rows: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for cell in found:
        if cell.key.config != FULL:
            text = f"{cell.difference} ({cell.num_samples})"
            rows[cell.key.config][cell.key.model, cell.key.data] = text
    lines = [["configuration", *(" ".join(place) for place in places)]]
    lines.append(["---"] * len(lines[0]))
    lines += [[f"`{name}`", *(row.get(p, "") for p in places)] for name, row in rows.items()]
    return markdown(lines)
