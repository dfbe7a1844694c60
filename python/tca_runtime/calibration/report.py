"""What a calibration found, for people.

    python -m tca_runtime.calibration.report FILE...

prints it again, and draws the heat maps that a machine without matplotlib could not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tca_runtime.calibration.observer import PHASES, Totals
from tca_runtime.sparsity.settings import CalibrationFile, ConfigurationError


def held_out_figures(totals: Totals, phase: int, choice: NDArray[np.int64]) -> dict[str, float]:
    """How a choice does on samples it was not made from.

    ``output_error`` is the root of the relative squared error of a layer's attention output, its
    heads' errors summed as if independent, averaged over layers.
    """
    index = choice[..., None]
    mass = np.take_along_axis(totals.mass[phase], index, -1) / totals.chunks[phase]
    error = np.take_along_axis(totals.error[phase], index, -1) / totals.chunks[phase]
    return {
        "retained_mass": float(mass.mean()),
        "least_retained_mass": float(mass.min()),
        "output_error": float(np.sqrt(error.sum(axis=(1, 2))).mean()),
    }


def as_text(found: CalibrationFile) -> str:
    """Kept ratio per layer, and the held-out figures."""
    budgets = {phase: np.array(getattr(found, phase).keep_ratio) for phase in PHASES}
    head = "".join(f"{phase + ' kept %':>21}" for phase in PHASES)
    lines = [
        f"threshold {found.threshold:g}, objective {found.objective}",
        f"{'':>5}{head}",
        f"layer{'min   mean    max':>21}{'min   mean    max':>21}",
    ]
    for layer in range(found.num_layers):
        cells = "".join(_cell(budgets[phase][layer]) for phase in PHASES)
        lines.append(f"{layer:>5}{cells}")
    lines.append(f"{'all':>5}" + "".join(_cell(budgets[phase]) for phase in PHASES))
    for phase in PHASES:
        figures: dict[str, Any] = found.report["held_out"][phase]
        parts = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in figures.items())
        lines.append(f"held out, {phase}: {parts}")
    return "\n".join(lines)


def _cell(ratios: NDArray[np.float64]) -> str:
    low, mean, high = 100 * ratios.min(), 100 * ratios.mean(), 100 * ratios.max()
    return f"{low:>7.1f}{mean:>7.1f}{high:>7.1f}"


def draw_heat_map(found: CalibrationFile, path: Path) -> bool:
    """Kept ratio of every head as a PNG; False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 1.5 + 0.18 * found.num_layers), layout="constrained")
    panels = figure.subplots(1, len(PHASES), squeeze=False)[0]
    for panel, phase in zip(panels, PHASES, strict=True):
        ratios = np.array(getattr(found, phase).keep_ratio)
        image = panel.imshow(ratios, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set_title(f"{phase}: {ratios.mean():.1%} kept")
        panel.set_xlabel("KV head")
        panel.set_xticks(range(found.num_kv_heads))
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="share of candidates kept")
    figure.suptitle(f"{found.model}, threshold {found.threshold:g}, {found.objective}")
    figure.savefig(path, dpi=110)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Show calibration files. Returns the process's exit status."""
    paths = [Path(name) for name in (sys.argv[1:] if argv is None else argv)]
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    for path in paths:
        try:
            found = CalibrationFile.load(path)
        except ConfigurationError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"\n{path}\n{as_text(found)}")
        show_heat_map(found, path)
    return 0


def show_heat_map(found: CalibrationFile, path: Path) -> None:
    """Draw the heat map beside the file, or say what is missing for it."""
    if not draw_heat_map(found, path.with_suffix(".png")):
        print(
            "no heat map: it needs matplotlib; where that is installed, run\n"
            f"  python -m tca_runtime.calibration.report {path}"
        )


if __name__ == "__main__":
    sys.exit(main())
