"""Curves over the context length, from the results of ``bench_engine.py``.

python benchmark/gpu/plot_scaling.py benchmark/results/gpu_engine*_h200.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

plt.rcParams["svg.fonttype"] = "none"
plt.rcParams["svg.hashsalt"] = "scaling"

Curves = dict[str, dict[int, float]]
NAMES = {"fa3": "dense, FA3", "fa2": "dense, FA2", "10": "views of 10 %", "39": "views of 39 %"}
DECODE_NAMES = {"dense": "dense", "ragged": "39 % kept"}


def read(paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """The tables of all files; where two hold the same row, the later file's counts."""
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in paths:
        for name, rows in json.loads(path.read_text()).items():
            tables[name] += rows
    return tables


def curves(rows: list[dict[str, Any]], names: dict[str, str], value: str) -> Curves:
    found: Curves = {label: {} for label in names.values()}
    for row in rows:
        if row["mode"] in names:
            found[names[row["mode"]]][row["context"]] = row[value]
    return found


def draw(axes: Axes, lines: Curves, title: str, unit: str) -> None:
    contexts: set[int] = set()
    for label, points in lines.items():
        order = sorted(points)
        contexts.update(order)
        axes.plot(order, [points[c] for c in order], marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(contexts), [f"{c >> 10}K" for c in sorted(contexts)])
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.legend()


def main() -> int:
    parser = argparse.ArgumentParser(description="Plot prefill, decode and selection by context.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("docs/scaling.svg"))
    args = parser.parse_args()
    tables = read(args.results)
    figure, (prefill, decode, share) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    draw(prefill, curves(tables["prefill"], NAMES, "seconds"), "cold prefill", "seconds")
    prefill.set_yscale("log")
    alone = [row for row in tables["decode_step"] if row["batch"] == 1]
    draw(decode, curves(alone, DECODE_NAMES, "step_ms"), "decode step, one request", "ms")
    parts: Curves = defaultdict(dict)
    for row in tables["breakdown"]:
        if row["kept"] == 0.1:
            for part in ("projections", "attention", "score", "select", "gather"):
                parts[part][row["context"]] = 100 * row[part] / row["kernels_ms"]
    draw(share, parts, "prefill, views of 10 %", "% of device time")
    figure.savefig(args.output, format="svg", metadata={"Date": None})
    print("wrote", args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
