"""A whole calibration: measure the samples, choose the budgets, write the files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from tqdm import tqdm

from tca_runtime.calibration.calibrator import CalibrationError, Calibrator
from tca_runtime.calibration.choose import Provenance, calibration_file, split
from tca_runtime.calibration.data import CalibrationData, Tokens
from tca_runtime.calibration.observer import Totals
from tca_runtime.calibration.options import Options
from tca_runtime.calibration.report import as_text, show_heat_map
from tca_runtime.tokenizer.loading import load_tokenizer


def calibrate(options: Options) -> list[Path]:
    """Measure, choose, and write one file per goal; returns their paths.

    Raises
    ------
    CalibrationError, DataError, ModelError, FetchError
        For settings, data or a model that cannot be used.
    """
    data = CalibrationData.load(options.data)
    calibrator = Calibrator(options.model, options.length, options.window)
    encode = load_tokenizer(options.model).encode
    samples = data.samples(encode, options.samples, options.length, options.seed)
    begin = time.monotonic()
    totals = _measure_all(calibrator, samples, options)
    if not all((part.chunks > 0).all() for part in split(totals)):
        # A chunk's own view needs a chunk before it.
        least = calibrator.settings.granularity
        raise CalibrationError(f"nothing to drop: samples need more than {least} tokens")
    print(f"measured {len(samples)} samples in {time.monotonic() - begin:.0f} s")
    name = options.model.served_model_name or Path(options.model.model_path).name
    origin = Provenance(name, data.sha256, options.seed, options.length)
    paths = []
    for goal in options.goals:
        path = options.output
        if len(options.goals) > 1:
            path = path.with_name(f"{path.stem}-{goal.threshold:g}{path.suffix}")
        found = calibration_file(
            goal, totals, calibrator.grid, calibrator.settings, calibrator.identity, origin
        )
        path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
        print(f"\n{path}\n{as_text(found)}")
        show_heat_map(found, path)
        paths.append(path)
    return paths


def _measure_all(
    calibrator: Calibrator, samples: Sequence[Tokens], options: Options
) -> list[Totals]:
    """Measure every sample, keeping each one's sums beside the output."""
    settings, grid = calibrator.settings, calibrator.grid
    key = hashlib.sha256(calibrator.identity.fingerprint.encode())
    key.update(repr((settings.block, settings.window, settings.probes)).encode())
    key.update(grid.mu.tobytes() + grid.sigma.tobytes())
    directory = options.output.with_suffix(".samples")
    directory.mkdir(parents=True, exist_ok=True)
    totals = []
    for tokens in tqdm(samples, desc="calibrating", unit="sample"):
        of_sample = key.copy()
        of_sample.update(tokens.tobytes())
        path = directory / f"{of_sample.hexdigest()[:16]}.npz"
        if not (options.resume and path.exists()):
            calibrator.measure(tokens).save(path)
        totals.append(Totals.load(path))
    return totals
