"""What is compared: ways to select, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tca_runtime.sparsity.budget import DEFAULT_SIGMA, BudgetTable
from tca_runtime.sparsity.policies import POLICIES
from tca_runtime.sparsity.settings import CalibrationFile, SparsitySettings

_PATTERN = re.compile(r"(?P<policy>[a-z0-9-]+?)(?:\[(?P<options>[^\]]*)\])?(?P<rest>(?: \S+)*)")
# Budgets of the file that comes with the runtime.
SHIPPED = "calibrated"
# What a request says of its decode view.
LIMITS = ("max_dropped_mass", "min_confidence")
# What a word of a name sets: its letters, then a value.
_WORDS = {
    "p": "prefill",
    "d": "decode",
    "k": "kept",
    "probes": "probes",
    "pprobes": "prefill_probes",
    "window": "window",
    "block": "block",
    "sigma": "sigma",
    "every": "granularity",
    "least": "min_candidates",
    "mass": "max_dropped_mass",
    "sure": "min_confidence",
    "first": "first_refresh",
    "refresh": "refresh",
    "latest": "refresh_probes",
    "tail": "tail",
}


@dataclass(frozen=True)
class Configuration:
    """One way to select. Its name says all of it and can be parsed back.

    Attributes
    ----------
    name : such as ``full``, ``tca p15 d39``, ``snapkv p100 d25 probes64``, or
        ``tca[score=mass] p100 d39``; ``p`` and ``d`` are the percentages kept in prefill and decode
        views of what is older than the window; ``k`` instead of ``d`` is the percentage kept of
        everything at a data set's length; ``pprobes`` are the queries that score for prefill views,
        where they are fewer than ``probes``; ``every`` is the selection granularity, ``mass`` the
        percentage of attention mass that may be dropped, ``sure`` the probability in percent below
        which a token is drawn again with these views, having begun with a fifth;
        ``calibration=FILE`` gives each head its own budget, ``calibrated`` the one that comes with
        the runtime; ``least`` is the number of droppable tokens below which all are kept;
        ``refresh`` the generated tokens between two selections of the decode view (with ``first``
        those before the first, then twice as many each time) by ``latest`` queries, ``tail`` the
        last tokens of a prompt that see everything
    """

    name: str
    policy: str
    options: dict[str, Any] = field(default_factory=dict)
    prefill: float | None = None
    decode: float | None = None
    kept: float | None = None
    probes: int = 32
    prefill_probes: int | None = None
    window: int = 512
    block: int = 64
    sigma: float = DEFAULT_SIGMA
    granularity: int = 2048
    min_candidates: int = 512
    max_dropped_mass: float | None = None
    min_confidence: float | None = None
    calibration: str | None = None
    first_refresh: int | None = None
    refresh: int = 1024
    refresh_probes: int = 32
    tail: int = 0

    @staticmethod
    def parse(name: str) -> Configuration:
        """Read a name.

        Raises
        ------
        ValueError
            For an unknown policy or word, or a ratio out of range.
        """
        match = _PATTERN.fullmatch(name.strip())
        if match is None or match["policy"] not in POLICIES:
            raise ValueError(f"configuration {name!r}: known policies are {', '.join(POLICIES)}")
        made = Configuration(name.strip(), match["policy"], _options(match["options"]))
        for word in match["rest"].split():
            made = replace(made, **_read_word(name, word))
        return made

    def at_length(self, length: int) -> Configuration:
        """With ``k`` turned into the ``d`` that keeps as much at this length.

        Raises
        ------
        ValueError
            When the window alone is more than that.
        """
        if self.kept is None:
            return self
        ratio = (self.kept * length - self.window) / (length - self.window)
        if ratio < 1 / self.block:
            raise ValueError(
                f"configuration {self.name!r} keeps less than its window at {length} tokens"
            )
        return replace(self, decode=ratio, kept=None)

    def settings(
        self, layers: int, heads: int, shipped: Path | None = None
    ) -> SparsitySettings | None:
        """As the engine takes them; None for full attention.

        ``shipped`` is the file that ``calibrated`` stands for.

        Raises
        ------
        ValueError
            For ``calibrated`` without such a file.
        """
        if self.policy == "full":
            return None
        path = shipped if self.calibration == SHIPPED else self.calibration
        if self.calibration and path is None:
            raise ValueError(f"configuration {self.name!r}: the model comes without a calibration")
        found = CalibrationFile.load(Path(path)) if path else None
        tables = []
        for phase, ratio in (("prefill", self.prefill), ("decode", self.decode)):
            if found is not None:
                table = getattr(found, phase).table(found.block)
                table = table if ratio is None else table.at_ratio(ratio)
            else:
                spread = np.full((layers, heads), self.sigma)
                table = BudgetTable(np.zeros_like(spread), spread, self.block)
                table = table.at_ratio(1.0 if ratio is None else ratio)
            tables.append(table)
        policy = POLICIES[self.policy](**self.options)
        return SparsitySettings(
            policy,
            tables[0],
            tables[1],
            self.window,
            self.probes,
            self.prefill_probes,
            self.min_candidates,
            self.granularity,
            self.first_refresh or self.refresh,
            self.refresh,
            self.refresh_probes,
            self.tail,
        )

    @property
    def has_limit(self) -> bool:
        """Whether how much is kept depends on the request."""
        return any(getattr(self, name) is not None for name in LIMITS)

    @property
    def prefill_key(self) -> str:
        """Equal for configurations whose prompts have the same K and V: they share prefixes."""
        prefill = 1.0 if self.prefill is None and self.calibration is None else self.prefill
        if self.policy == "full" or prefill == 1.0:
            return "dense"
        views = dict.fromkeys(("decode", "kept", *LIMITS))
        return repr(
            replace(self, name="", first_refresh=None, refresh=0, refresh_probes=0, **views)
        )


def _options(text: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, (text or "").split(",")):
        key, _, value = part.partition("=")
        try:
            options[key] = int(value)
        except ValueError:
            options[key] = value
    return options


def _read_word(name: str, word: str) -> dict[str, Any]:
    if word == SHIPPED:
        return {"calibration": SHIPPED}
    if word.startswith("calibration="):
        return {"calibration": word.removeprefix("calibration=")}
    match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", word)
    if match is None or match[1] not in _WORDS:
        raise ValueError(f"configuration {name!r}: cannot read {word!r}")
    attribute, number = _WORDS[match[1]], float(match[2])
    if attribute in ("prefill", "decode", "kept", *LIMITS):
        if not 0 < number <= 100:
            raise ValueError(f"configuration {name!r}: {word!r} is no percentage")
        return {attribute: number / 100}
    if attribute == "sigma":
        return {attribute: number}
    return {attribute: int(number)}
