"""Measure a model once and give each of its heads a budget.

    python -m tca_runtime.calibrate --model-path M --threshold 0.9 --output c.json

writes ``c.json`` for ``launch_server --tca-config c.json`` and ``c.png``, a heat map.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Before torch loads OpenMP: threads that spin at barriers slow a shared machine down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tca_runtime.calibration.calibrator import CalibrationError
from tca_runtime.calibration.data import DataError
from tca_runtime.calibration.options import parse_options
from tca_runtime.calibration.run import calibrate
from tca_runtime.fetch_model import FetchError
from tca_runtime.models.errors import ModelError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a calibration. Returns the process's exit status."""
    try:
        calibrate(parse_options(argv))
    except (CalibrationError, DataError, ModelError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
