"""The parts of docs/quality.md that show cells, and which cells each shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmark.quality.cells import FULL, Cell
from benchmark.quality.configurations import SHIPPED, Configuration
from benchmark.quality.conversations import MODES
from benchmark.quality.tables import (
    COLUMNS,
    DROPPED,
    MEMORY,
    SECONDS,
    TURNS,
    WHERE,
    Column,
    lost_table,
    table,
    task_table,
)

EARLIER = "w512-0.95.json"
"""What ``calibrated`` stood for until 27 November 2026: a window of 512, 15 % in prefill views."""

QUARTER = "w128-0.9.json"
"""The shipped budgets for threshold 0.9."""


@dataclass(frozen=True)
class Section:
    """A part of the page: which cells, and how they are shown.

    ``wanted`` looks at the cell's configuration; sections of single prompts have no modes.
    ``by_task`` and ``only_lost`` are other forms of table: `task_table`, `lost_table`.
    """

    wanted: Callable[[Configuration], bool]
    columns: Sequence[Column] = (*WHERE, *COLUMNS)
    modes: frozenset[str] = frozenset({""})
    lengths: frozenset[str] = frozenset()
    by_task: bool = False
    only_lost: bool = False

    def cells(self, found: Sequence[Cell]) -> list[Cell]:
        return [
            cell
            for cell in found
            if cell.key.mode in self.modes
            and (not self.lengths or cell.key.data in self.lengths)
            and self.wanted(Configuration.parse(cell.key.config))
        ]

    def show(self, found: Sequence[Cell]) -> str:
        """Its cells of all that were found, as Markdown."""
        chosen = self.cells(found)
        if chosen and self.by_task:
            models = dict.fromkeys(cell.key.model for cell in chosen)
            return "\n\n".join(
                f"{model}:\n\n{task_table([c for c in chosen if c.key.model == model])}"
                for model in models
            )
        return lost_table(chosen) if chosen and self.only_lost else table(chosen, self.columns)


def _is_plain(c: Configuration) -> bool:
    """The settings of the first runs: uniform budgets, no tail, a selection every 2048."""
    first = (c.probes, c.window, c.block, c.granularity, c.tail, c.refresh)
    return (
        first == (32, 512, 64, 2048, 0, 1024)
        and not c.options
        and not c.has_limit
        and c.calibration is None
    )


def _is_served(c: Configuration) -> bool:
    """The settings a server has by default, and with the budgets that keep a quarter."""
    kept = {SHIPPED: 0.39, QUARTER: 0.25}.get(c.calibration or "")
    return c.policy == FULL or (_is_tca(c) and c.prefill == 0.39 and c.kept == kept)


def _is_tca(c: Configuration) -> bool:
    """All but the ratios as served."""
    sizes = (c.probes, c.prefill_probes, c.window, c.block)
    plain = not c.options and not _is_auto(c) and sizes == (32, None, 128, 64)
    return c.policy == "tca" and plain and _is_current(c)


def _is_earlier(c: Configuration) -> bool:
    """The budgets that came with the runtime before."""
    return c.policy == "tca" and c.calibration == EARLIER and _is_current(c) and not _is_auto(c)


def _is_current(c: Configuration) -> bool:
    """Tail, granularity and refreshes as a server has them by default."""
    now = (c.tail, c.granularity, c.first_refresh, c.refresh_probes)
    return now == (512, 4096, 16, 8)


def _is_around(c: Configuration) -> bool:
    """Keeps 39 % as served, and differs in one thing from that."""
    budgets = c.calibration in (SHIPPED, QUARTER) or (c.calibration is None and c.prefill == 0.39)
    return c.policy == FULL or (
        c.policy == "tca" and c.kept == 0.39 and budgets and not c.has_limit
    )


def _is_auto(c: Configuration) -> bool:
    return c.has_limit


def _is_part(c: Configuration) -> bool:
    """Differs in one thing from ``tca p100 k25`` or ``tca p15 k39`` with uniform budgets."""
    uniform = c.policy == "tca" and c.calibration is None and c.prefill != 0.39
    return uniform and c.first_refresh == 16 and not _is_auto(c)


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
        lengths=RULER_DATA | VIEWS_DATA | {"sessions-8192"},
        modes=frozenset({"", "turns"}),
    ),
    "thresholds": Section(
        lambda c: c.calibration not in (None, SHIPPED, EARLIER) and c.kept is None,
        (*WHERE, *COLUMNS, SECONDS),
        lengths=RULER_DATA,
    ),
    "views": Section(
        lambda c: c.policy == FULL or (c.kept == 0.39 and _is_current(c) and not c.options),
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
    "earlier": Section(_is_earlier, lengths=RULER_DATA, only_lost=True),
    "around": Section(_is_around, lengths=frozenset({"ruler-8192", "ruler-16384"}), only_lost=True),
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
    "confident": Section(
        lambda c: (c.kept, c.min_confidence) in ((0.39, 0.7), (0.32, 0.5), (0.32, 0.35)),
        modes=frozenset({"", "turns"}),
    ),
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
