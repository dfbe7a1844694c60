"""Figures with targets: verdict, table, and the JSON file that keeps them."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One measured value. ``limit`` is its target, None for a value shown beside others."""

    name: str
    value: float
    unit: str
    sense: Literal["at least", "at most"] = "at most"
    limit: float | None = None
    detail: str = ""

    @property
    def passed(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value >= self.limit if self.sense == "at least" else self.value <= self.limit


def format_figures(figures: Sequence[Figure]) -> str:
    """One line per figure: name, value, target, verdict, detail."""
    width = max(len(f.name) for f in figures)
    return "\n".join(
        f"{f.name:<{width}}  {f'{f.value:.4g} {f.unit}':>18}  {_target(f):<22}{f.detail}"
        for f in figures
    )


def save_figures(
    name: str, settings: Mapping[str, Any], figures: Sequence[Figure], raw: Mapping[str, Any]
) -> Path:
    """Write ``results/<name>.json``: when, where, how, the figures and the raw measurements."""
    document = {
        "benchmark": name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "figures": [{**asdict(f), "passed": f.passed} for f in figures],
        "raw": dict(raw),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def all_passed(figures: Sequence[Figure]) -> bool:
    return all(f.passed is not False for f in figures)


def load_before() -> float:
    """The one-minute load average, with a warning where others would disturb the figures."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: load average {load:.1f}; figures of a busy machine", file=sys.stderr)
    return load


def machine() -> dict[str, Any]:
    """What a reader needs to compare figures from different machines."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("tca-runtime", "torch", "transformers")},
    }


def _target(figure: Figure) -> str:
    if figure.limit is None:
        return ""
    return f"{figure.sense} {figure.limit:g}: {'PASS' if figure.passed else 'FAIL'}"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
