"""Selection on a GPU: all requests of a step in a few launches per layer, nothing waits.

Covers the TCA policy over complete lists, whose candidates are a prefix. Everything else takes
``StepSelection``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_kernels.dispatch import upload
from tca_kernels.gather import ViewSlots, ViewTables, view_slots_by_tables
from tca_kernels.score import ScoreTables, probe_scores_by_tables
from tca_kernels.select import SelectTables, block_scores, select_by_tables
from tca_runtime.attention.base import AttentionShape, LayerAttention, PieceLists
from tca_runtime.cache.runs import even_cuts, joined
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.sparsity.batched_decode import Ranking
from tca_runtime.sparsity.chooser import ChunkSelection, DecodeView
from tca_runtime.sparsity.last_queries import LastQueries
from tca_runtime.sparsity.policies.tca import TCAPolicy


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a chunk that share one selection.

    Attributes
    ----------
    chunk : number among the group's chunks
    token_start : place on the step's token axis
    begin, end : absolute positions
    num_candidates : tokens from the list's begin on that may be dropped
    """

    chunk: int
    token_start: int
    begin: int
    end: int
    num_candidates: int

    @property
    def token_end(self) -> int:
        return self.token_start + self.end - self.begin


class SelectionGroup:
    """Chunks that are scored and ranked alike.

    Their lists lie in one arena, so that every kernel runs once for all of them. The kernels'
    tables of all layers go to the device beforehand, so that a layer's choice uploads nothing.
    """

    def __init__(
        self,
        works: Sequence[ChunkSelection],
        token_starts: Sequence[int],
        ranking: Ranking,
        shape: AttentionShape,
        pool: SlotPool,
    ) -> None:
        self._shape = shape
        self._pool = pool
        self._ranking = ranking
        self._arena = joined([work.lists.slots for work in works])
        device = self._arena.device
        sizes = np.array([work.lists.num_slots for work in works])
        self.pieces = [
            piece
            for number, (work, start) in enumerate(zip(works, token_starts, strict=True))
            for piece in _pieces(number, work, start)
        ]
        scored = [piece for piece in self.pieces if piece.num_candidates]
        row_starts = [
            (offset + np.arange(shape.rows) * work.lists.end).reshape(shape.num_layers, -1)
            for offset, work in zip(sizes.cumsum() - sizes, works, strict=True)
        ]
        # Views need it contiguous, and would copy it in every layer.
        self._start = _piece_starts(row_starts, self.pieces, device).flatten(1).contiguous()
        self._scored_start = _piece_starts(row_starts, scored, device)
        self._score_tables = ScoreTables.build(
            self._by_head([p.end for p in scored]),
            self._by_head([p.num_candidates for p in scored]),
            device,
        )
        ends = torch.tensor([p.token_end for p in scored], dtype=torch.int64)
        self._probe_index = upload(ends[:, None] + torch.arange(-ranking.probes, 0), device)
        per_piece = [
            works[p.chunk].request.settings.prefill.level_counts(p.num_candidates // ranking.block)
            for p in self.pieces
        ]
        counts = self._by_head([p.num_candidates for p in self.pieces]).flatten()
        self._select_tables = SelectTables.build(
            counts // ranking.block,
            torch.from_numpy(np.stack(per_piece, axis=1)).flatten(1, 2),
            ranking.levels,
            device,
        )
        self._view_tables = ViewTables.build(
            counts,
            self._by_head([p.end for p in self.pieces]),
            torch.stack([tables.indptr for tables in self._select_tables]),
            device,
        )

    def choose(self, layer: int, q: Tensor) -> tuple[ViewSlots, NDArray[np.int64]]:
        """The pieces' lists in one layer, own tokens included, and their lengths."""
        scores = self._score(layer, q)
        chosen = select_by_tables(
            scores,
            block_scores(scores, self._ranking.block, self._ranking.score),
            self._select_tables[layer],
            descending=self._ranking.descending,
        )
        tables = self._view_tables[layer]
        views = view_slots_by_tables(self._arena, self._start[layer], chosen, tables)
        return views, views.indptr.diff().view(len(self.pieces), -1).numpy()

    def _score(self, layer: int, q: Tensor) -> Tensor:
        """Importances of the pieces' candidates."""
        return probe_scores_by_tables(
            q[self._probe_index],
            self._pool.kv,
            self._arena,
            self._scored_start[layer],
            self._score_tables,
            self._shape.scale,
        )

    def _by_head(self, values: Sequence[int]) -> Tensor:
        column = torch.tensor(values, dtype=torch.int64)[:, None]
        return column.expand(-1, self._shape.num_kv_heads).contiguous()


class BatchedSelection:
    """The ``BatchViewChooser`` of one forward pass.

    Chunks that see everything are none of its ``chunks``. Of those that end a prompt ``watching``
    keeps the last queries, by which the decode views are chosen after the pass.
    """

    def __init__(
        self,
        shape: AttentionShape,
        pool: SlotPool,
        chunks: Sequence[ChunkSelection | None],
        token_starts: Sequence[int],
    ) -> None:
        choosing: dict[Ranking, list[int]] = {}
        ending: dict[Ranking, list[int]] = {}
        for number, work in enumerate(chunks):
            if work is None:
                continue
            pieces = _pieces(number, work, 0)
            if any(piece.num_candidates for piece in pieces):
                shortest = min(piece.end - piece.begin for piece in pieces)
                probes = min(shortest, work.request.settings.num_prefill_probes)
                choosing.setdefault(ranking_of(work, probes), []).append(number)
            if work.decode is not None:
                ending.setdefault(ranking_of(work, work.num_tokens), []).append(number)

        def of(numbers: Sequence[int]) -> list[ChunkSelection]:
            return [work for number in numbers if (work := chunks[number]) is not None]

        self._groups = [
            SelectionGroup(of(numbers), [token_starts[n] for n in numbers], ranking, shape, pool)
            for ranking, numbers in choosing.items()
        ]
        self._ending: list[tuple[list[int], LastQueries]] = []
        for ranking, numbers in ending.items():
            works = of(numbers)
            ends = [token_starts[n] + w.num_tokens for n, w in zip(numbers, works, strict=True)]
            self._ending.append((numbers, LastQueries(works, ends, ranking, shape, pool)))
        self._decode_views: dict[int, DecodeView] | None = None
        self.chunks = frozenset(number for numbers in choosing.values() for number in numbers)
        self.pieces: Sequence[tuple[int, int]] = [
            (piece.token_start, piece.end - piece.begin)
            for group in self._groups
            for piece in group.pieces
        ]

    def __call__(self, layer: int, q: Tensor) -> PieceLists:
        """See ``BatchViewChooser``."""
        chosen = [group.choose(layer, q) for group in self._groups]
        slots = [views.slots for views, _ in chosen]
        return PieceLists(
            joined(slots),
            np.concatenate([lengths for _, lengths in chosen]),
        )

    def watching(self, attention: LayerAttention) -> LayerAttention:
        """``attention`` that also keeps the last queries of chunks that end a prompt."""
        if not self._ending:
            return attention

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for _, queries in self._ending:
                queries.keep(layer, q)
            return attention(layer, q, k, v)

        return attend

    def decode_view(self, chunk: int) -> DecodeView | None:
        """See ``StepSelection.decode_view``."""
        if self._decode_views is None:
            self._decode_views = {}
            for numbers, queries in self._ending:
                self._decode_views |= zip(numbers, queries.decode_views(), strict=True)
        return self._decode_views.get(chunk)


def covers(chunks: Sequence[ChunkSelection | None]) -> bool:
    """Whether every selection is TCA's over complete lists."""
    return all(
        work is None or (isinstance(work.request.settings.policy, TCAPolicy) and work.lists.is_full)
        for work in chunks
    )


def ranking_of(work: ChunkSelection, num_queries: int) -> Ranking:
    """What others must share to be selected for together with this chunk."""
    settings = work.request.settings
    assert isinstance(settings.policy, TCAPolicy)
    return Ranking(settings.policy, settings.block, min(settings.probes, num_queries))


def _pieces(chunk: int, work: ChunkSelection, token_start: int) -> list[Piece]:
    settings = work.request.settings
    end = work.lists.end
    cuts = even_cuts(end - work.num_tokens, end, settings.granularity)
    return [
        Piece(
            chunk,
            token_start + a - cuts[0],
            a,
            b,
            0 if work.sees_past else settings.num_candidates(a),
        )
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]


def _piece_starts(
    row_starts: Sequence[NDArray[np.int64]], pieces: Sequence[Piece], device: torch.device
) -> Tensor:
    """Where the lists of every piece begin: int64 ``[L, pieces, Hkv]``.

    Those of a single chunk are expanded, by which kernels know that its pieces share lists.
    """
    if len(row_starts) == 1:
        table = torch.from_numpy(row_starts[0])[:, None]
        return upload(table, device).expand(-1, len(pieces), -1)
    empty = np.zeros((*row_starts[0].shape[:1], 0, row_starts[0].shape[1]), dtype=np.int64)
    stacked = [row_starts[piece.chunk][:, None] for piece in pieces]
    return upload(torch.from_numpy(np.concatenate([empty, *stacked], axis=1)), device)
