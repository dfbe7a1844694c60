"""Decode steps captured as CUDA graphs: one launch instead of several per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tca_runtime.attention.base import AttentionBackend, AttentionStep
from tca_runtime.cache.views import ViewTable
from tca_runtime.models.base import CausalLM

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)

# Rows of the input table.
_TOKENS, _POSITIONS, _VIEWS, _GROWTH = range(4)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    hidden: Tensor


class DecodeGraphs:
    """Forward passes of one new token per request, for a few batch sizes.

    A graph shows one more prepared slot of each request's lists, runs the model, and leaves the
    hidden states. Smaller batches are padded with the view table's row that belongs to nobody.
    All graphs read one input table, which one copy fills.
    """

    def __init__(
        self, model: CausalLM, backend: AttentionBackend, views: ViewTable, max_batch: int
    ) -> None:
        self._model = model
        self._backend = backend
        self._views = views
        self._sizes = [n for n in BATCH_SIZES if n < max_batch]
        self._sizes += [n for n in BATCH_SIZES if n >= max_batch][:1]
        largest = self._sizes[-1]
        # Rewritten only after the previous step's tokens have reached the host.
        self._staging = torch.zeros(4, largest, dtype=torch.int64).pin_memory()
        self._inputs = torch.zeros_like(self._staging, device=views.arena.device)
        self._captured: dict[int, _Captured] = {}

    @property
    def max_batch(self) -> int:
        return self._sizes[-1]

    def capture(self) -> None:
        """Capture all batch sizes; takes seconds."""
        self._fill([], [], [])
        pool = None
        for size in reversed(self._sizes):
            # The first run compiles kernels, which a capture may not.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._forward(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                hidden = self._forward(size)
            pool = graph.pool()
            self._captured[size] = _Captured(graph, hidden)

    def run(self, tokens: Sequence[int], positions: Sequence[int], views: Sequence[int]) -> Tensor:
        """Hidden states ``[B, hidden]``, valid until the next run; ``views``: rows of the table."""
        self._fill(tokens, positions, views)
        captured = self._captured[next(n for n in self._sizes if n >= len(tokens))]
        captured.graph.replay()
        return captured.hidden[: len(tokens)]

    def _fill(self, tokens: Sequence[int], positions: Sequence[int], views: Sequence[int]) -> None:
        table = self._staging.numpy()
        table[:] = np.array([[0], [0], [self._views.padding_index], [0]])
        count = len(tokens)
        table[_TOKENS, :count] = tokens
        table[_POSITIONS, :count] = positions
        table[_VIEWS, :count] = views
        table[_GROWTH, :count] = 1
        self._inputs.copy_(self._staging, non_blocking=True)

    def _forward(self, size: int) -> Tensor:
        inputs, table = self._inputs[:, :size], self._views
        views = inputs[_VIEWS]
        grown = table.length[views] + inputs[_GROWTH].int()[:, None]
        # Padding names one row several times, always with the same value.
        table.length[views] = grown
        lists = table.lists(views)
        step = AttentionStep(
            num_decode=size,
            decode=lists,
            chunks=(),
            prefill=None,
            new_slots=table.last_slots(lists).transpose(0, 1),
        )
        attention = self._backend.begin(step)
        return self._model.forward(inputs[_TOKENS], inputs[_POSITIONS], attention)
