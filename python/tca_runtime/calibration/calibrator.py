"""A loaded model and the means to measure it."""

from __future__ import annotations

import numpy as np
import torch

from tca_runtime.attention.base import AttentionStep, PrefillChunk
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.radix_tree import Namespace
from tca_runtime.cache.sequence import Sequence
from tca_runtime.calibration.data import Tokens
from tca_runtime.calibration.grid import Grid
from tca_runtime.calibration.observer import ChunkObserver, Totals
from tca_runtime.config import (
    CacheArgs,
    ModelArgs,
    RuntimeConfig,
    SchedulerArgs,
    SparsityArgs,
)
from tca_runtime.engine.engine import Engine
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.settings import DEFAULT_WINDOW, ModelIdentity, SparsitySettings

# Tokens of a sample that share a prefill view. Samples must be longer: the first has no past.
CHUNK = 2048


class CalibrationError(ValueError):
    """Settings that do not go together; the message says which."""


class Calibrator:
    """A loaded model and the means to measure it."""

    def __init__(self, model: ModelArgs, length: int, window: int = DEFAULT_WINDOW) -> None:
        """``length``: tokens of the longest sample; ``window``: the latest, kept by every head."""
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
        self.settings = SparsitySettings(
            TCAPolicy(), everything, everything, window, granularity=CHUNK
        )
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

    def _observe(self, sequence: Sequence, chunk: Tokens, totals: Totals) -> None:
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
        lengths = (view.lengths + view.grown).reshape(shape.num_layers, -1)
        step = AttentionStep(
            num_decode=0,
            decode=None,
            chunks=[PrefillChunk(0, len(chunk), begin, 0, view.uniform_length, lengths)],
            prefill=cache.views.lists(index),
            new_slots=slots.view(shape.num_layers, shape.num_kv_heads, -1).transpose(1, 2),
            choose_view=observer,
        )
        ids = torch.from_numpy(chunk.astype(np.int64)).to(shape.device)
        positions = torch.arange(begin, begin + len(chunk), device=shape.device)
        self.engine.model.forward(ids, positions, self.engine.backend.begin(step))
