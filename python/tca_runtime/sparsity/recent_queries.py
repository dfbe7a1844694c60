"""The queries of every request's latest generated tokens: what chooses its next decode view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tca_kernels.dispatch import upload
from tca_runtime.attention.base import AttentionShape, LayerAttention


class RecentQueries:
    """A ring of queries per layer and row of the view table, written as requests decode.

    So a refresh computes nothing again: it scores with queries that are there, in all layers at
    once, while the step that decodes stays one captured graph.

    Parameters
    ----------
    num_views : rows of the view table, the one of padding included
    depth : tokens of a request whose queries are kept
    """

    def __init__(self, num_views: int, depth: int, shape: AttentionShape) -> None:
        self.depth = depth
        size = (shape.num_layers, num_views * depth, shape.num_q_heads, shape.head_dim)
        self._rings = torch.zeros(size, dtype=shape.dtype, device=shape.device)

    def recording(
        self, attention: LayerAttention, views: Tensor, positions: Tensor
    ) -> LayerAttention:
        """``attention`` that also keeps the queries of the step's decode requests.

        Parameters
        ----------
        views, positions : int64 ``[B]``, of the step's first ``B`` tokens: their requests' rows of
            the view table, and the tokens' absolute positions
        """
        places = self._places(views, positions)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._rings[layer].index_copy_(0, places, q[: len(places)])
            return attention(layer, q, k, v)

        return attend

    def latest(self, views: Sequence[int], ends: Sequence[int], count: int) -> Tensor:
        """Queries of each request's last tokens: ``[B, L, count, Hq, D]``.

        Parameters
        ----------
        ends : positions behind the newest token of each; all ``count`` must have been recorded
        """
        if count > self.depth:
            raise ValueError(f"queries of {self.depth} tokens are kept, not of {count}")
        back = torch.arange(-count, 0)
        places = self._places(torch.tensor(views)[:, None], torch.tensor(ends)[:, None] + back)
        found = self._rings[:, upload(places, self._rings.device)]
        return found.transpose(0, 1)

    def _places(self, views: Tensor, positions: Tensor) -> Tensor:
        return views * self.depth + positions % self.depth
