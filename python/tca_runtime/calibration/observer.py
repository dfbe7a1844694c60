"""Watches a dense forward pass and sums up what every configuration would have kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_runtime.attention.base import AttentionShape, HeadLists
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.calibration.grid import Grid
from tca_runtime.calibration.measure import Attended, output_error, rank, retained_mass
from tca_runtime.sparsity.chooser import layer_lists
from tca_runtime.sparsity.layout import Layout
from tca_runtime.sparsity.selection import LayerScores
from tca_runtime.sparsity.settings import SparsitySettings

PHASES = ("prefill", "decode")
# Queries that judge a prefill choice, spread over the chunk.
PREFILL_QUERIES = 32
# Queries that judge a decode choice: those right after the probes, as generated tokens would be.
# Judged by the probes themselves, a choice seems best that keeps just the tokens they looked at.
DECODE_QUERIES = 16
# Queries of which outputs are compared; vectors are dearer than masses.
OUTPUT_QUERIES = 8


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums over chunks, by phase.

    Attributes
    ----------
    mass : float64 ``[2, L, Hkv, M]``, retained attention mass
    error : float64 ``[2, L, Hkv, M]``, relative squared error of the layer's output
    chunks : int64 ``[2]``, terms in the sums
    """

    mass: NDArray[np.float64]
    error: NDArray[np.float64]
    chunks: NDArray[np.int64]

    @staticmethod
    def zeros(num_layers: int, num_kv_heads: int, grid: Grid) -> Totals:
        shape = (len(PHASES), num_layers, num_kv_heads, grid.size)
        return Totals(np.zeros(shape), np.zeros(shape), np.zeros(len(PHASES), dtype=np.int64))

    @staticmethod
    def sum(parts: Sequence[Totals]) -> Totals:
        return Totals(
            np.sum([part.mass for part in parts], axis=0),
            np.sum([part.error for part in parts], axis=0),
            np.sum([part.chunks for part in parts], axis=0),
        )

    @staticmethod
    def load(path: Path) -> Totals:
        with np.load(path) as saved:
            return Totals(saved["mass"], saved["error"], saved["chunks"])

    def save(self, path: Path) -> None:
        """Write in one step, so that an interrupted run leaves no half file."""
        partial = path.with_suffix(".tmp")
        with partial.open("wb") as file:
            np.savez(file, mass=self.mass, error=self.error, chunks=self.chunks)
        partial.replace(path)


@dataclass(frozen=True, eq=False)
class Trial:
    """One selection to judge.

    Attributes
    ----------
    lists : what exists when the choice is made; ends with the probes' tokens
    layout : its candidates
    probes : the chunk's queries that choose
    judges : int64 ``[E]``, the chunk's queries that judge
    """

    lists: HeadSlots
    layout: Layout
    probes: slice
    judges: Tensor

    @staticmethod
    def prefill(lists: HeadSlots, num_tokens: int, settings: SparsitySettings) -> Trial | None:
        """A chunk's own view, chosen by its latest queries and used by all of them."""
        layout = Layout.of([lists], settings.num_candidates(lists.end - num_tokens), settings.block)
        if not layout.num_candidates:
            return None
        probes = slice(max(0, num_tokens - settings.num_prefill_probes), num_tokens)
        return Trial(lists, layout, probes, _spread(0, num_tokens, PREFILL_QUERIES))

    @staticmethod
    def decode(lists: HeadSlots, num_tokens: int, settings: SparsitySettings) -> Trial | None:
        """The view of a prompt that ends a little before the chunk does."""
        end = num_tokens - DECODE_QUERIES
        if end <= 0:
            return None
        lists = lists.split(lists.end - DECODE_QUERIES)[0]
        layout = Layout.of([lists], settings.num_candidates(lists.end), settings.block)
        if not layout.num_candidates:
            return None
        probes = slice(max(0, end - settings.probes), end)
        return Trial(lists, layout, probes, _spread(end, num_tokens, DECODE_QUERIES))


def _spread(first: int, end: int, count: int) -> Tensor:
    return torch.linspace(first, end - 1, min(count, end - first)).round().long()


class ChunkObserver:
    """The ``ViewChooser`` of one dense prefill chunk: changes nothing, measures every layer.

    Parameters
    ----------
    kv : the slot pool's storage
    lists : everything that exists of the prompt, the chunk included
    num_tokens : length of the chunk
    projections : per layer, the output projection ``[Hq * D, hidden]``
    totals : what is measured is added here
    """

    def __init__(
        self,
        shape: AttentionShape,
        kv: Tensor,
        lists: HeadSlots,
        num_tokens: int,
        settings: SparsitySettings,
        grid: Grid,
        projections: Sequence[Tensor],
        totals: Totals,
    ) -> None:
        self._shape = shape
        self._kv = kv
        self._lists = lists
        self._begin = lists.end - num_tokens
        self._grid = grid
        self._projections = projections
        self._totals = totals
        self._trials = [
            Trial.prefill(lists, num_tokens, settings),
            Trial.decode(lists, num_tokens, settings),
        ]
        totals.chunks[:] += [trial is not None for trial in self._trials]

    def __call__(self, layer: int, chunk: int, q: Tensor) -> HeadLists | None:
        """Measure; None, because attention stays full."""
        if any(self._trials):
            heads = self._shape.num_kv_heads
            rows = slice(layer * heads, (layer + 1) * heads)
            slots = layer_lists(self._lists, rows).slots.long()
            context = self._kv[slots].view(heads, -1, *self._kv.shape[1:])
            for phase, trial in enumerate(self._trials):
                if trial is not None:
                    mass, error = self._judge(trial, q, context, layer, rows)
                    self._totals.mass[phase, layer] += mass.double().cpu().numpy()
                    self._totals.error[phase, layer] += error.double().cpu().numpy()
        return None

    def _judge(
        self, trial: Trial, q: Tensor, context: Tensor, layer: int, rows: slice
    ) -> tuple[Tensor, Tensor]:
        lists = layer_lists(trial.lists, rows)
        scores = LayerScores.measure(q[trial.probes], self._kv, lists, self._shape.scale)
        importance = scores.scores[scores.index(trial.layout, rows)]
        order = rank(importance, self._grid.block)
        judges = trial.judges.to(q.device)
        attended = Attended.compute(q[judges], judges + self._begin, context, self._shape.scale)
        mass = retained_mass(attended, order, self._grid)
        few = slice(None, None, max(1, len(judges) // OUTPUT_QUERIES))
        by_query = attended.weights.unflatten(1, (len(judges), -1))[:, few].flatten(1, 2)
        compared = Attended(by_query, attended.values)
        return mass, output_error(compared, order, self._grid, self._projections[layer])
