"""What a limit on the dropped mass would have kept, from the answers at every kept ratio.

Auto mode (``max_dropped_mass``) takes the smallest ratio whose dropped mass is within the limit.
Where a question was answered at several ratios, the answer at any limit is therefore among them.
So is what a model would have answered that reads more where it is not sure (``sure_table``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.quality.cells import FULL, LEAST_FULL
from benchmark.quality.configurations import SHIPPED, Configuration
from benchmark.quality.records import Record
from benchmark.quality.statistics import bootstrap
from benchmark.quality.tables import markdown
from tca_runtime.sparsity.chooser import LITTLE

# Percent of the attention mass.
LIMITS = (2, 3, 4, 5, 6, 7, 8, 9)
# Where the model is less sure than that while it reads ``LITTLE``, it would read ``MORE``.
SURE = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8)
MORE = 0.39
# Ratios without which a model's answers are no ladder.
FEWEST_RATIOS = 5

Question = tuple[str, str, str, int]
Array = NDArray[np.float64]
Row = tuple[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Ladder:
    """Questions that one model answered at every ratio.

    Attributes
    ----------
    ratios : kept, ascending ``[R]``
    strata : data set and task of each question ``[Q]``
    scores, kept, dropped, sure : ``[Q, R]``
    full : scores with full attention ``[Q]``
    """

    ratios: tuple[float, ...]
    strata: tuple[str, ...]
    scores: Array
    kept: Array
    dropped: Array
    sure: Array
    full: Array

    def within(self, limit: float) -> NDArray[np.int64]:
        """Which ratio a limit on the dropped mass takes for each question; the largest if none."""
        fits = self.dropped <= limit
        fits[:, -1] = True
        return fits.argmax(axis=1)

    def where_sure(self, limit: float) -> NDArray[np.int64]:
        """``LITTLE`` where the model was that sure with it, else ``MORE``."""
        little, more = self.ratios.index(LITTLE), self.ratios.index(MORE)
        return np.where(self.sure[:, little] >= limit, little, more)

    def enough(self) -> NDArray[np.int64]:
        """The smallest ratio from which on no answer is worse than with full attention."""
        right = self.scores >= self.full[:, None] - 1e-9
        right[:, -1] = True
        onwards = np.logical_and.accumulate(right[:, ::-1], axis=1)[:, ::-1]
        return onwards.argmax(axis=1)

    def row(self, name: str, taken: NDArray[np.int64]) -> list[str]:
        """Kept share and losses when question ``q`` is answered at ratio ``taken[q]``."""
        rows = np.arange(len(taken))
        scores = self.scores[rows, taken]
        kept = bootstrap(self.kept[rows, taken].tolist(), self.strata)
        others = (self.full, self.scores[:, self.ratios.index(MORE)])
        lost = [str(bootstrap((scores - other).tolist(), self.strata)) for other in others]
        return [name, f"{kept.mean:.1f}", *lost]


def ladder_table(records: Iterable[Record]) -> str:
    """Markdown: fixed ratios, limits and the least that would have done, by model."""
    return _table(records, lambda ladder: [("the least that answers as well", ladder.enough())])


def sure_table(records: Iterable[Record]) -> str:
    """Markdown: fixed ratios, limits, and more where the model is not sure, by model.

    Only of answers that say how sure it was.
    """

    def rows(ladder: Ladder) -> list[Row]:
        name = f"{percent(LITTLE)}, and {percent(MORE)} where less sure than"
        return [(f"{name} {p}", ladder.where_sure(p)) for p in SURE]

    told = [r for r in records if "sure" in r or r.get("config") == FULL]
    return _table(told, rows, pooled=True)


def _table(
    records: Iterable[Record], more: Callable[[Ladder], list[Row]], pooled: bool = False
) -> str:
    by_model: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["kind"] in ("answer", "turn"):
            by_model[record["model"]].append(record)
    found = {name: ladder for name, a in by_model.items() if (ladder := _ladder(a)) is not None}
    if pooled and len(found) > 1 and len({ladder.ratios for ladder in found.values()}) == 1:
        found["all"] = _pooled(found)
    head = ["model", "questions", "what is kept", "kept %", "minus full", f"minus {percent(MORE)}"]
    lines = [head, ["---"] * len(head)]
    for model, ladder in found.items():
        count = len(ladder.full)
        named = [(percent(ratio), np.full(count, i)) for i, ratio in enumerate(ladder.ratios)]
        named += [(f"at most {limit} % dropped", ladder.within(limit / 100)) for limit in LIMITS]
        for name, taken in [*named, *more(ladder)]:
            lines.append([model, str(count), *ladder.row(name, taken)])
    return markdown(lines)


def percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %"


def _pooled(ladders: Mapping[str, Ladder]) -> Ladder:
    """Questions of all models, each model's tasks strata of their own."""
    parts = list(ladders.values())

    def joined(name: str) -> Array:
        return np.concatenate([getattr(part, name) for part in parts])

    return Ladder(
        ratios=parts[0].ratios,
        strata=tuple(f"{model} {s}" for model, part in ladders.items() for s in part.strata),
        scores=joined("scores"),
        kept=joined("kept"),
        dropped=joined("dropped"),
        sure=joined("sure"),
        full=joined("full"),
    )


def _ladder(records: Sequence[Record]) -> Ladder | None:
    """Of the shipped budgets' answers, those to questions that were asked at every ratio."""
    full: dict[Question, Record] = {}
    answers: dict[Question, dict[float, Record]] = defaultdict(dict)
    for record in records:
        question = (record["data"], record.get("mode", ""), record["sample"], record.get("turn", 0))
        if record["config"] == FULL:
            full[question] = record
        elif ratio := _rung(record["config"]):
            answers[question][ratio] = record
    ratios = tuple(sorted({ratio for found in answers.values() for ratio in found}))
    groups: dict[str, list[Question]] = defaultdict(list)
    for question, found in answers.items():
        if question in full and len(found) == len(ratios):
            groups[question[0] + question[1] + full[question]["task"]].append(question)
    counting = {
        name: members
        for name, members in groups.items()
        if np.mean([full[question]["score"] for question in members]) >= LEAST_FULL
    }
    if len(ratios) < FEWEST_RATIOS or not counting:
        return None
    asked = [(name, question) for name, members in counting.items() for question in members]

    def field(name: str) -> Array:
        return np.array([[answers[q][ratio].get(name, 1.0) for ratio in ratios] for _, q in asked])

    return Ladder(
        ratios=ratios,
        strata=tuple(name for name, _ in asked),
        scores=field("score"),
        kept=field("kept"),
        dropped=field("dropped"),
        sure=field("sure"),
        full=np.array([full[question]["score"] for _, question in asked]),
    )


def _rung(name: str) -> float | None:
    """The kept ratio, where nothing else differs from the server's defaults."""
    kept, confidence = served(name) or (None, None)
    return kept if confidence is None else None


def served(name: str) -> tuple[float | None, float | None] | None:
    """Kept ratio and ``min_confidence``, where nothing else differs from the server's defaults."""
    found = Configuration.parse(name)
    default = Configuration.parse(
        f"tca p39 k39 every4096 tail512 first16 latest8 window128 {SHIPPED}"
    )
    varied: dict[str, Any] = {"name": "", "kept": None, "min_confidence": None}
    same = replace(found, **varied) == replace(default, **varied)
    return (found.kept, found.min_confidence) if same else None
