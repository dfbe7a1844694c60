"""The last queries of prompts: what chooses the views that their requests decode with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tca_kernels.dispatch import upload
from tca_runtime.attention.base import AttentionShape
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.sparsity.batched_decode import Ranking, views_of_queries
from tca_runtime.sparsity.chooser import ChunkSelection, DecodeView


class LastQueries:
    """Keeps queries layer by layer, scores all layers at once after the pass.

    That takes a few launches instead of a few per layer. A chunk that sees everything needs no
    selection in any layer then, and attends as in full attention.

    Parameters
    ----------
    works : of chunks that end a prompt
    token_ends : where each ends on the step's token axis
    """

    def __init__(
        self,
        works: Sequence[ChunkSelection],
        token_ends: Sequence[int],
        ranking: Ranking,
        shape: AttentionShape,
        pool: SlotPool,
    ) -> None:
        self._works = works
        self._ranking = ranking
        self._shape = shape
        self._pool = pool
        places = torch.tensor(token_ends)[:, None] + torch.arange(-ranking.probes, 0)
        self._places = upload(places.flatten(), shape.device)
        size = (shape.num_layers, len(works), ranking.probes, shape.num_q_heads, shape.head_dim)
        self._kept = torch.empty(size, dtype=shape.dtype, device=shape.device)

    def keep(self, layer: int, q: Tensor) -> None:
        """Copy what is needed of a layer's ``[T, Hq, D]``."""
        torch.index_select(q, 0, self._places, out=self._kept[layer].flatten(0, 1))

    def decode_views(self) -> list[DecodeView]:
        """After the pass, the views of ``works``."""
        latest = self._kept.transpose(0, 1)
        return views_of_queries(self._works, latest, self._ranking, self._shape, self._pool)
