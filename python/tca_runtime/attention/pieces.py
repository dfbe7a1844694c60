"""Prefill attention over pieces: runs of tokens whose KV heads attend to lists of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_kernels import dispatch
from tca_kernels.fused import copy_rows

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Runs of the step's tokens whose lists are attended to in one call.

    Attributes
    ----------
    spans : first token and number of tokens of each
    size : their common length if they are equal and adjacent, as the pieces of a long chunk are,
        and 0 otherwise
    """

    spans: Sequence[tuple[int, int]]
    size: int
    _uploaded: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(spans: Sequence[tuple[int, int]]) -> Pieces:
        sizes = {n for _, n in spans}
        starts = [start for start, _ in spans]
        size = sizes.pop() if len(sizes) == 1 else 0
        adjacent = starts == [starts[0] + i * size for i in range(len(spans))]
        return Pieces(spans, size if adjacent else 0)

    @cached_property
    def starts(self) -> Lengths:
        return np.array([start for start, _ in self.spans], dtype=np.int64)

    @cached_property
    def lengths(self) -> Lengths:
        return np.array([n for _, n in self.spans], dtype=np.int64)

    def pack(self, q: Tensor, num_kv_heads: int) -> Tensor:
        """``[T, Hq, D]`` to rows ordered by piece, KV head, token: ``[n * Hkv, group, D]``."""
        group, dim = q.shape[1] // num_kv_heads, q.shape[2]
        if not self.size:
            rows = self._rows(num_kv_heads, q.device)
            return q.reshape(-1, group, dim).index_select(0, rows)
        source = self._blocks(q, num_kv_heads)
        target = q.new_empty(len(self.spans), num_kv_heads, self.size, group * dim)
        copy_rows(source, target.transpose(1, 2))
        return target.view(-1, group, dim)

    def unpack(self, rows: Tensor, out: Tensor, num_kv_heads: int) -> None:
        """Write packed rows to their tokens of ``out [T, Hq, D]``."""
        group, dim = rows.shape[1:]
        if not self.size:
            out.view(-1, group, dim).index_copy_(0, self._rows(num_kv_heads, out.device), rows)
            return
        source = rows.view(len(self.spans), num_kv_heads, self.size, group * dim)
        copy_rows(source.transpose(1, 2), self._blocks(out, num_kv_heads))

    def _rows(self, num_kv_heads: int, device: torch.device) -> Tensor:
        """int64: the places of the packed rows in ``[T * Hkv, group * D]``; all layers share it."""
        if num_kv_heads not in self._uploaded:
            heads = np.arange(num_kv_heads)[:, None]
            rows = [(np.arange(s, s + n) * num_kv_heads + heads).ravel() for s, n in self.spans]
            table = torch.from_numpy(np.concatenate(rows))
            self._uploaded[num_kv_heads] = dispatch.upload(table, device)
        return self._uploaded[num_kv_heads]

    def _blocks(self, heads: Tensor, num_kv_heads: int) -> Tensor:
        """The pieces' part of ``[T, Hq, D]`` as ``[pieces, size, Hkv, group * D]``."""
        begin = self.spans[0][0]
        rows = heads[begin : begin + self.size * len(self.spans)].flatten(1)
        return rows.view(len(self.spans), self.size, num_kv_heads, -1)


class RaggedPrefill(ABC):
    """Causal attention over sequences laid end to end."""

    @abstractmethod
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, kv_lengths: Lengths
    ) -> Tensor:
        """Attend; the last query of a sequence sees all of its keys.

        Parameters
        ----------
        q : ``[sum(q_lengths), Hq, D]``
        k, v : ``[sum(kv_lengths), Hkv, D]``
        q_lengths, kv_lengths : per sequence, on the host

        Returns
        -------
        Like ``q``.
        """

    def attend_pieces(
        self, q: Tensor, keys: Tensor, values: Tensor, pieces: Pieces, lengths: Lengths, out: Tensor
    ) -> None:
        """Attend with each KV head of each piece to keys and values of its own.

        Here queries are copied to where KV heads are sequences, and results back.

        Parameters
        ----------
        q, out : ``[T, Hq, D]``; only the pieces' tokens are read and written
        keys, values : ``[sum(lengths), D]``, contiguous, ordered by piece and KV head
        lengths : int64 ``[pieces, Hkv]``, on the host
        """
        heads = lengths.shape[1]
        rows = pieces.pack(q, heads)
        q_lengths = pieces.lengths.repeat(heads)
        result = self(rows, keys[:, None], values[:, None], q_lengths, lengths.reshape(-1))
        pieces.unpack(result, out, heads)
