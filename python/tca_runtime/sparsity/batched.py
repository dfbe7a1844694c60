"""Selection on a GPU: every piece of a chunk in a few launches per layer, nothing waits.

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
from tca_kernels.gather import ViewSlots, view_slots
from tca_kernels.score import probe_scores
from tca_kernels.select import Selection, block_scores, select
from tca_runtime.attention.base import AttentionShape, PieceLists
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.sparsity.budget import BudgetTable, levels
from tca_runtime.sparsity.chooser import ChunkSelection, DecodeView, rungs
from tca_runtime.sparsity.policies.tca import TCAPolicy


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a chunk that share one selection.

    Attributes
    ----------
    token_start : place on the step's token axis
    begin, end : absolute positions
    num_candidates : tokens from the list's begin on that may be dropped
    """

    token_start: int
    begin: int
    end: int
    num_candidates: int


class BatchedChunk:
    """One chunk's selections: tables that all layers share, and the scores for the decode view."""

    def __init__(
        self, work: ChunkSelection, token_start: int, shape: AttentionShape, pool: SlotPool
    ) -> None:
        self._work = work
        self._shape = shape
        self._pool = pool
        settings = work.request.settings
        assert isinstance(settings.policy, TCAPolicy)
        self._policy = settings.policy
        self._block = settings.block
        end = work.lists.end
        self._num_tokens = end
        cuts = _cuts(end - work.num_tokens, end, settings.granularity)

        def candidates(past: int) -> int:
            return 0 if work.sees_past else settings.num_candidates(past)

        self.pieces = [
            Piece(token_start + a - cuts[0], a, b, candidates(a))
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        self._num_decode = work.decode.num_candidates if work.decode is not None else 0
        self._probes = min(settings.probes, *(p.end - p.begin for p in self.pieces))
        rows = torch.arange(shape.rows, device=work.lists.slots.device) * end
        self._start = rows.view(shape.num_layers, shape.num_kv_heads)
        counts = [p.num_candidates for p in self.pieces]
        self._counts = self._by_head(counts)
        counts[-1] = max(counts[-1], self._num_decode)
        self._scored = [i for i, count in enumerate(counts) if count]
        self._score_counts = self._by_head([counts[i] for i in self._scored])
        self._lengths = self._by_head([p.end for p in self.pieces])
        self._blocks = self._counts.flatten() // self._block
        per_piece = [
            settings.prefill.level_counts(p.num_candidates // self._block) for p in self.pieces
        ]
        self._levels = torch.from_numpy(np.stack(per_piece, axis=1))
        self._decode_scores: list[Tensor] = []

    def choose(self, layer: int, q: Tensor) -> tuple[ViewSlots, NDArray[np.int64]]:
        """The pieces' lists in one layer, own tokens included, and their lengths."""
        start = self._start[layer].expand(len(self.pieces), -1)
        scores = self._score(layer, q)
        ranking = block_scores(scores, self._block, self._policy.score)
        counts = self._levels[layer].flatten(0, 1)
        chosen = self._select(scores, ranking, self._blocks, counts)
        slots = self._work.lists.slots
        views = view_slots(slots, start, self._counts, self._lengths, chosen)
        return views, views.indptr.diff().view(len(self.pieces), -1).numpy()

    def decode_view(self) -> DecodeView | None:
        """After the last layer: what the prompt's last piece chose, None to see everything."""
        if not self._num_decode:
            return None
        request = self._work.request
        budget = request.settings.decode
        scores = torch.cat(self._decode_scores)
        ranking = block_scores(scores, self._block, self._policy.score)
        if request.max_dropped_mass is None:
            return self._view(scores, ranking, budget)
        for ratio in rungs(self._block):
            view = self._view(scores, ranking, budget.at_ratio(ratio))
            if float(view.dropped_mass) <= request.max_dropped_mass:
                break
        return view

    def _score(self, layer: int, q: Tensor) -> Tensor:
        """Importances of the pieces' candidates; those of the decode view are kept aside."""
        if not self._scored:
            return torch.empty(0, dtype=torch.float32, device=q.device)
        ends = [p.token_start + p.end - p.begin for p in (self.pieces[i] for i in self._scored)]
        probes = torch.stack([q[end - self._probes : end] for end in ends])
        scores = probe_scores(
            probes,
            self._pool.kv,
            self._work.lists.slots,
            self._start[layer].expand(len(ends), -1),
            self._lengths[self._scored],
            self._score_counts,
            self._shape.scale,
        )
        if not self._num_decode:
            return scores
        heads, count = self._shape.num_kv_heads, self.pieces[-1].num_candidates
        rest, last = scores.tensor_split([scores.numel() - heads * self._num_decode])
        self._decode_scores.append(last.clone())
        last = last.view(heads, -1)
        self._remember(layer, last)
        return torch.cat((rest, last[:, :count].reshape(-1)))

    def _remember(self, layer: int, scores: Tensor) -> None:
        """Raise the slots' accumulated importance to the scores."""
        heads = self._shape.num_kv_heads
        rows = self._work.lists.dense()[layer * heads : (layer + 1) * heads]
        slots = rows[:, : scores.shape[1]].long()
        best = self._pool.importance
        best[slots] = torch.maximum(best[slots], scores.to(best.dtype))

    def _select(
        self, scores: Tensor, ranking: Tensor, row_blocks: Tensor, counts: Tensor
    ) -> Selection:
        sizes = tuple(levels(self._block).tolist())
        descending = self._policy.concentrated_keeps == "few"
        return select(scores, ranking, row_blocks, counts, sizes, descending=descending)

    def _view(self, scores: Tensor, ranking: Tensor, budget: BudgetTable) -> DecodeView:
        rows = self._shape.rows
        lists = self._work.lists
        num_blocks = self._num_decode // self._block
        counts = torch.from_numpy(budget.level_counts(num_blocks)).flatten(0, 1)
        chosen = self._select(scores, ranking, torch.full((rows,), num_blocks), counts)
        candidates = torch.full((rows,), self._num_decode)
        lengths = torch.full((rows,), self._num_tokens)
        view = view_slots(lists.slots, self._start, candidates, lengths, chosen)
        return DecodeView(
            lengths=view.indptr.diff().numpy(),
            slots=view.slots,
            lists=lists,
            keep=self._kept(chosen),
            dropped_mass=chosen.dropped_mass.mean(),
            report={
                "kept_ratio": len(view.slots) / lists.num_slots,
                "probes": self._probes,
            },
        )

    def _kept(self, chosen: Selection) -> Tensor:
        device = chosen.indices.device
        keep = torch.ones(self._shape.rows, self._num_tokens, dtype=torch.bool, device=device)
        keep[:, : self._num_decode] = False
        sizes = upload(chosen.indptr.diff(), device)
        begins = torch.repeat_interleave(
            self._start.flatten(), sizes, output_size=chosen.indices.numel()
        )
        # Assigning a number through an index would make the host wait for the device.
        keep.view(-1).index_fill_(0, begins + chosen.indices, True)
        return keep.view(-1)

    def _by_head(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values)[:, None].expand(-1, self._shape.num_kv_heads).contiguous()


class BatchedSelection:
    """The ``BatchViewChooser`` of one forward pass."""

    def __init__(
        self,
        shape: AttentionShape,
        pool: SlotPool,
        chunks: Sequence[ChunkSelection | None],
        token_starts: Sequence[int],
    ) -> None:
        self._chunks = {
            number: BatchedChunk(work, token_starts[number], shape, pool)
            for number, work in enumerate(chunks)
            if work is not None
        }
        self.chunks = frozenset(self._chunks)
        self.pieces: Sequence[tuple[int, int]] = [
            (piece.token_start, piece.end - piece.begin)
            for chunk in self._chunks.values()
            for piece in chunk.pieces
        ]

    @staticmethod
    def covers(chunks: Sequence[ChunkSelection | None]) -> bool:
        """Whether every selection is TCA's over complete lists."""
        return all(
            work is None
            or (isinstance(work.request.settings.policy, TCAPolicy) and work.lists.is_full)
            for work in chunks
        )

    def __call__(self, layer: int, q: Tensor) -> PieceLists:
        """See ``BatchViewChooser``."""
        chosen = [chunk.choose(layer, q) for chunk in self._chunks.values()]
        slots = [views.slots for views, _ in chosen]
        return PieceLists(
            slots[0] if len(slots) == 1 else torch.cat(slots),
            np.concatenate([lengths for _, lengths in chosen]),
        )

    def decode_view(self, chunk: int) -> DecodeView | None:
        """See ``StepSelection.decode_view``."""
        work = self._chunks.get(chunk)
        return None if work is None else work.decode_view()


def _cuts(begin: int, end: int, granularity: int) -> list[int]:
    """Bounds of the pieces: as few as the granularity allows, all about equally long."""
    count = -(-(end - begin) // granularity)
    return [begin + (end - begin) * i // count for i in range(count + 1)]
