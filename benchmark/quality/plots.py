"""The page's images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmark.quality.cells import FULL, Cell
from benchmark.quality.configurations import Configuration


def draw(found: Sequence[Cell], directory: Path) -> None:
    """Loss of accuracy over kept ratio, one image per model and data set with several policies."""
    directory.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in found:
        if not cell.key.mode:
            groups[cell.key.model, cell.key.data].append(cell)
    for (model, data), cells in groups.items():
        _pareto(model, data, cells, directory / f"quality_{model}_{data}.png")


def _series(cell: Cell) -> str | None:
    made = Configuration.parse(cell.key.config)
    plain = (made.probes, made.block) == (32, 64) and not made.options
    if made.policy == FULL or not plain or cell.kept is None:
        return None
    if made.min_confidence is not None:
        return f"{made.policy}, more where not sure"
    if made.tail:
        budgets = "calibrated" if made.calibration else "uniform"
        return f"{made.policy}, {100 * (made.prefill or 1):.0f} % in prefill, tail, {budgets}"
    if made.granularity != 2048 or made.refresh < 1024:
        return None
    if made.max_dropped_mass is not None:
        return f"{made.policy}, limit on dropped mass"
    if made.prefill == 1.0:
        window = "" if made.window == 512 else f", window {made.window}"
        return f"{made.policy}, dense prefill{window}"
    return f"{made.policy}, {100 * (made.prefill or 1):.0f} % in prefill"


def _pareto(model: str, data: str, cells: Sequence[Cell], path: Path) -> None:
    series: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if name := _series(cell):
            series[name].append(cell)
    if len(series) < 2:
        return
    figure, axes = plt.subplots(figsize=(10.5, 5), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors, marker=list("oooooooooossssssssss"))
    for name, members in series.items():
        members.sort(key=lambda c: c.kept or 0.0)
        axes.errorbar(
            [100 * (c.kept or 0.0) for c in members],
            [c.difference.mean for c in members],
            yerr=[
                [c.difference.mean - c.difference.low for c in members],
                [c.difference.high - c.difference.mean for c in members],
            ],
            capsize=2,
            linewidth=1.2,
            label=name,
        )
    # Differences are paired: cells that were cut off have fewer samples, but the same on each side.
    axes.axhline(0, color="black", linestyle="--", label="full attention")
    axes.set_xlabel("tokens in the decode view, %")
    axes.set_ylabel("accuracy minus full attention, points")
    axes.set_title(f"{model}, {data}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)
