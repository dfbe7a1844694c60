"""Measure a model once and give each of its heads a budget.

    python -m tca_runtime.calibrate --model-path M --threshold 0.9 --output c.json

writes ``c.json`` for ``launch_server --tca-config c.json`` and ``c.png``, a heat map.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Before torch loads OpenMP: threads that spin at barriers slow a shared machine down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import msgspec
import numpy as np
import torch
from tqdm import tqdm

from tca_runtime.attention.base import AttentionStep, PrefillChunk
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.radix_tree import Namespace
from tca_runtime.cache.sequence import Sequence as CachedSequence
from tca_runtime.config import CacheArgs, ModelArgs, RuntimeConfig, SchedulerArgs, SparsityArgs
from tca_runtime.engine.engine import Engine
from tca_runtime.fetch_model import FetchError
from tca_runtime.models.errors import ModelError
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.calibration.choose import Provenance, calibration_file, split
from tca_runtime.sparsity.calibration.data import CalibrationData, DataError, Tokens
from tca_runtime.sparsity.calibration.grid import Grid
from tca_runtime.sparsity.calibration.observer import ChunkObserver, Totals
from tca_runtime.sparsity.calibration.options import Options, parse_options
from tca_runtime.sparsity.calibration.report import as_text, draw_heat_map
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.settings import ModelIdentity, SparsitySettings
from tca_runtime.tokenizer.loading import load_tokenizer


class CalibrationError(ValueError):
    """Settings that do not go together; the message says which."""


class Calibrator:
    """A loaded model and the means to measure it."""

    def __init__(self, model: ModelArgs, length: int) -> None:
        """``length``: tokens of the longest sample."""
        self.engine = Engine(
            RuntimeConfig(
                model=model,
                cache=CacheArgs(max_total_tokens=length, disable_radix_cache=True),
                scheduler=SchedulerArgs(max_running_requests=1),
                sparsity=SparsityArgs(disable_tca=True, host_cache_size=0),
            )
        )
        longest = self.engine.model_config.max_position
        if length > longest:
            raise CalibrationError(f"--length {length} is more than the model's context {longest}")
        shape = self.engine.shape
        everything = BudgetTable.uniform(1.0, shape.num_layers, shape.num_kv_heads)
        self.settings = SparsitySettings(TCAPolicy(), everything, everything)
        self.grid = Grid.build(self.settings.block)
        self.identity = ModelIdentity(
            self.engine.model.fingerprint(), shape.num_layers, shape.num_kv_heads, shape.head_dim
        )
        self._projections = [
            self.engine.model.output_projection(layer) for layer in range(shape.num_layers)
        ]

    @torch.inference_mode()
    def measure(self, tokens: Tokens) -> Totals:
        """Run one prompt with full attention, chunk by chunk, and watch."""
        shape, cache = self.engine.shape, self.engine.cache
        totals = Totals.zeros(shape.num_layers, shape.num_kv_heads, self.grid)
        sequence = cache.begin(cache.match(Namespace(), tokens[:0]), len(tokens))
        assert sequence is not None
        size = self.settings.granularity
        for begin in range(0, len(tokens), size):
            self._observe(sequence, tokens[begin : begin + size], totals)
        cache.release(Namespace(), sequence, tokens[:0])
        return totals

    def _observe(self, sequence: CachedSequence, chunk: Tokens, totals: Totals) -> None:
        shape, cache = self.engine.shape, self.engine.cache
        begin = sequence.computed
        slots = cache.extend(sequence, len(chunk))
        observer = ChunkObserver(
            shape,
            cache.pool.kv,
            HeadSlots.concat(cache.parts(sequence)),
            len(chunk),
            self.settings,
            self.grid,
            self._projections,
            totals,
        )
        view = sequence.view
        index = torch.tensor([view.index], device=shape.device)
        step = AttentionStep(
            num_decode=0,
            decode=None,
            chunks=[PrefillChunk(0, len(chunk), begin, 0, view.uniform_length)],
            prefill=cache.views.lists(index),
            new_slots=slots.view(shape.num_layers, shape.num_kv_heads, -1).transpose(1, 2),
            choose_view=observer,
        )
        ids = torch.from_numpy(chunk.astype(np.int64)).to(shape.device)
        positions = torch.arange(begin, begin + len(chunk), device=shape.device)
        self.engine.model.forward(ids, positions, self.engine.backend.begin(step))


def calibrate(options: Options) -> list[Path]:
    """Measure, choose, and write one file per goal; returns their paths.

    Raises
    ------
    CalibrationError, DataError, ModelError, FetchError
        For settings, data or a model that cannot be used.
    """
    data = CalibrationData.load(options.data)
    calibrator = Calibrator(options.model, options.length)
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
        if not draw_heat_map(found, path.with_suffix(".png")):
            print("no heat map: it needs matplotlib (pip install matplotlib)")
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
