"""From what was measured to a calibration file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tca_runtime.calibration.grid import Grid
from tca_runtime.calibration.objective import cheapest, least_error
from tca_runtime.calibration.observer import PHASES, Totals
from tca_runtime.calibration.report import held_out_figures
from tca_runtime.sparsity.settings import (
    FORMAT_VERSION,
    CalibrationFile,
    ModelIdentity,
    PhaseBudget,
    SparsitySettings,
)

Objective = Literal["mass", "output-error"]
OBJECTIVES: tuple[Objective, ...] = ("mass", "output-error")


@dataclass(frozen=True)
class Goal:
    """What is wanted of a configuration.

    Attributes
    ----------
    threshold : attention mass to retain
    objective : ``mass`` gives every head that much (Algorithm 1); ``output-error`` spends the
        same memory where it changes the layers' outputs most
    ratios : average keep ratio of (prefill, decode) for ``output-error``, instead of what the
        threshold would take
    floors : least keep ratio of every head, for (prefill, decode)
    """

    threshold: float
    objective: Objective = "mass"
    ratios: tuple[float, float] | None = None
    floors: tuple[float, float] = (0.0, 0.0)

    def choose(self, totals: Totals, grid: Grid, phase: int) -> NDArray[np.int64]:
        """The grid index of every head: int64 ``[L, Hkv]``."""
        mass = totals.mass[phase] / totals.chunks[phase]
        choice = cheapest(mass, grid, self.threshold, self.floors[phase])
        if self.objective == "mass":
            return choice
        ratio = self.ratios[phase] if self.ratios else float(grid.ratio[choice].mean())
        error = totals.error[phase] / totals.chunks[phase]
        return least_error(error, grid, ratio, self.floors[phase])


@dataclass(frozen=True)
class Provenance:
    """Where a calibration's numbers come from."""

    model: str
    data_sha256: str
    seed: int
    length: int


def split(samples: Sequence[Totals]) -> tuple[Totals, Totals]:
    """Sums over the samples to choose from, and over the last fifth, which only judges."""
    held_out = max(1, len(samples) // 5)
    return Totals.sum(samples[:-held_out]), Totals.sum(samples[-held_out:])


def calibration_file(
    goal: Goal,
    samples: Sequence[Totals],
    grid: Grid,
    settings: SparsitySettings,
    identity: ModelIdentity,
    origin: Provenance,
) -> CalibrationFile:
    """Choose every head's budget and judge the choice on the held-out samples."""
    chosen_from, held_out = split(samples)
    budgets: dict[str, PhaseBudget] = {}
    figures: dict[str, Any] = {}
    for phase, name in enumerate(PHASES):
        choice = goal.choose(chosen_from, grid, phase)
        mass = np.take_along_axis(chosen_from.mass[phase], choice[..., None], -1)[..., 0]
        budgets[name] = PhaseBudget(
            mu=_rounded(grid.mu[choice]),
            sigma=_rounded(grid.sigma[choice]),
            keep_ratio=_rounded(grid.ratio[choice]),
            retained_mass=_rounded(mass / chosen_from.chunks[phase]),
        )
        figures[name] = held_out_figures(held_out, phase, choice)
    return CalibrationFile(
        version=FORMAT_VERSION,
        model=origin.model,
        fingerprint=identity.fingerprint,
        num_layers=identity.num_layers,
        num_kv_heads=identity.num_kv_heads,
        head_dim=identity.head_dim,
        block=settings.block,
        window=settings.window,
        probes=settings.probes,
        threshold=goal.threshold,
        objective=goal.objective,
        data_sha256=origin.data_sha256,
        seed=origin.seed,
        prefill=budgets["prefill"],
        decode=budgets["decode"],
        report={
            "samples": len(samples),
            "length": origin.length,
            "floors": goal.floors,
            "held_out": figures,
        },
    )


def _rounded(values: NDArray[np.float64]) -> list[list[float]]:
    rounded: list[list[float]] = np.round(values, 6).tolist()
    return rounded
