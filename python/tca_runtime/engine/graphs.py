"""Decode steps captured as CUDA graphs: one launch instead of several per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tca_runtime.attention.base import AttentionBackend, AttentionStep
from tca_runtime.cache.views import ViewTable
from tca_runtime.garbage import no_collections
from tca_runtime.models.base import CausalLM
from tca_runtime.sparsity.recent_queries import RecentQueries

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)

# Rows of the input table.
_POSITIONS, _VIEWS, _GROWTH = range(3)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    hidden: Tensor


class DecodeGraphs:
    """Forward passes of one new token per request, for a few batch sizes.

    A graph shows one more prepared slot of each request's lists, runs the model, and leaves the
    hidden states. Smaller batches are padded with the view table's row that belongs to nobody.
    All graphs read one input table, which one copy fills, and the token buffer, which the sampler
    fills: the host need not know the tokens. Queries are recorded in ``queries``, if given.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        views: ViewTable,
        token_buffer: Tensor,
        queries: RecentQueries | None,
        max_batch: int,
    ) -> None:
        self._model = model
        self._backend = backend
        self._views = views
        self._token_buffer = token_buffer
        self._queries = queries
        self._sizes = [n for n in BATCH_SIZES if n < max_batch]
        self._sizes += [n for n in BATCH_SIZES if n >= max_batch][:1]
        shape = (3, self._sizes[-1])
        self._inputs = torch.zeros(shape, dtype=torch.int64, device=views.arena.device)
        self._captured: dict[int, _Captured] = {}

    @property
    def max_batch(self) -> int:
        return self._sizes[-1]

    def capture(self) -> None:
        """Capture all batch sizes; takes seconds."""
        self._fill([], [])
        with no_collections():
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

    def run(self, positions: Sequence[int], views: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, hidden]``, and ``views`` (rows of the table) on the device.

        Both are valid until the next run.
        """
        count = len(views)
        self._fill(positions, views)
        captured = self._captured[next(n for n in self._sizes if n >= count)]
        captured.graph.replay()
        return captured.hidden[:count], self._inputs[_VIEWS, :count]

    def _fill(self, positions: Sequence[int], views: Sequence[int]) -> None:
        # A buffer per run: the last run's may not have been read yet. The allocator of pinned
        # memory hands one out again only after the copies from it are done.
        staging = torch.empty(self._inputs.shape, dtype=torch.int64, pin_memory=True)
        table = staging.numpy()
        table[:] = np.array([[0], [self._views.padding_index], [0]])
        count = len(views)
        table[_POSITIONS, :count] = positions
        table[_VIEWS, :count] = views
        table[_GROWTH, :count] = 1
        self._inputs.copy_(staging, non_blocking=True)

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
        positions = inputs[_POSITIONS]
        if self._queries is not None:
            attention = self._queries.recording(attention, views, positions)
        return self._model.forward(self._token_buffer[views], positions, attention)
