"""What the model calls for attention, and what an attention implementation must offer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class LayerAttention(Protocol):
    """Stores this step's keys and values of one layer and attends. Models call nothing else."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend for one layer.

        Parameters
        ----------
        q : ``[T, Hq, D]``, after RoPE; ``[0, Hq, D]`` where nobody reads what the layer returns:
            keys and values are stored, nothing is selected or attended to
        k, v : ``[T, Hkv, D]``, ``k`` after RoPE

        Returns
        -------
        ``[T, Hq * D]`` in the dtype of ``q``, for as many tokens as ``q`` has.
        """
        ...


class SplitAttention(LayerAttention, Protocol):
    """Attention of one chunk alone whose queries may come in several runs per layer."""

    def split(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Callable[[int, int], Tensor]:
        """Store and select for one layer, as a call does; attend later.

        Returns
        -------
        ``attend(a, b)``: for tokens ``a`` to ``b``, what the call returns for them.
        """
        ...


@dataclass(frozen=True)
class AttentionShape:
    """Static sizes every backend needs."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def rows(self) -> int:
        """(layer, KV head) pairs; row = layer * num_kv_heads + head."""
        return self.num_layers * self.num_kv_heads

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)


@dataclass(frozen=True)
class SlotLists:
    """For a group of requests, the slots each (layer, KV head) attends to.

    ``arena[start : start + length]`` lists the slots of one (request, layer, head), positions
    ascending. During a step the lists already contain the slots of the step's own tokens.

    Attributes
    ----------
    arena : int32 ``[A]``
    start : int64 ``[B, L, Hkv]``
    length : int32 ``[B, L, Hkv]``
    """

    arena: Tensor
    start: Tensor
    length: Tensor


@dataclass(frozen=True, eq=False)
class HeadLists:
    """Slot lists of one layer of one request, one head after the other.

    Attributes
    ----------
    slots : int32 ``[sum(lengths)]``
    lengths : int64 ``[Hkv]``, on the host
    """

    slots: Tensor
    lengths: NDArray[np.int64]

    @property
    def begins(self) -> NDArray[np.int64]:
        """Where each head's list begins: int64 ``[Hkv]``."""
        return np.asarray(self.lengths.cumsum() - self.lengths)

    def per_head(self) -> Sequence[Tensor]:
        return torch.split(self.slots, self.lengths.tolist())


class ViewChooser(Protocol):
    """Decides, layer by layer, what of its past a prefill chunk attends to."""

    def __call__(self, layer: int, chunk: int, q: Tensor) -> HeadLists | None:
        """Past of chunk number ``chunk``, without the chunk's own tokens; None for all of it.

        Called once per layer and chunk, after the layer's K and V are in their slots; ``q``
        (``[n, Hq, D]``) are the chunk's queries.
        """
        ...


@dataclass(frozen=True)
class PrefillChunk:
    """A run of consecutive prompt tokens of one request.

    Attributes
    ----------
    token_start, num_tokens : the chunk's place on the step's flat token axis
    position : absolute position of its first token
    index : the request's place in ``StepLists.prefill``
    uniform_length : list length shared by all rows, chunk included; None when rows are ragged
    lengths : int64 ``[L, Hkv]`` on the host, the same for ragged rows too; None when only the
        device knows
    """

    token_start: int
    num_tokens: int
    position: int
    index: int
    uniform_length: int | None
    lengths: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class PieceLists:
    """What the pieces of a step's chunks attend to in one layer, their own tokens included.

    Attributes
    ----------
    slots : int32 ``[sum(lengths)]``, piece after piece, head after head; a piece's own tokens
        end each list
    lengths : int64 ``[pieces, Hkv]``, on the host
    """

    slots: Tensor
    lengths: NDArray[np.int64]


class BatchViewChooser(Protocol):
    """A ``ViewChooser`` for all chunks of a step at once, which no layer makes wait.

    A *piece* is a run of a chunk's tokens that share one selection.

    Attributes
    ----------
    chunks : numbers of the chunks that it chooses for; the others attend to their whole past
    pieces : places on the step's token axis, ``(token_start, num_tokens)`` each
    """

    chunks: frozenset[int]
    pieces: Sequence[tuple[int, int]]

    def __call__(self, layer: int, q: Tensor) -> PieceLists:
        """Choose for every piece; ``q`` is the layer's ``[T, Hq, D]``."""
        ...


@dataclass(frozen=True)
class AttentionStep:
    """One forward pass as attention sees it: decode tokens first, then prefill chunks.

    Attributes
    ----------
    num_decode : tokens ``[0, num_decode)`` are one new token of one request each
    decode : their lists, or None
    chunks : prefill chunks, in token order
    prefill : lists of the chunks' requests, or None
    new_slots : int32 ``[L, T, Hkv]``, where each token's K and V go
    choose_view : None when chunks attend to their whole past
    choose_views : takes the place of ``choose_view`` on devices that batch selections
    """

    num_decode: int
    decode: SlotLists | None
    chunks: Sequence[PrefillChunk]
    prefill: SlotLists | None
    new_slots: Tensor
    choose_view: ViewChooser | None = None
    choose_views: BatchViewChooser | None = None


class AttentionBackend(ABC):
    """Attention over slot lists. One instance serves all layers of one model.

    Attributes
    ----------
    batches_selections : whether it takes ``AttentionStep.choose_views``
    before_layer : called with a layer's number before anything is read of its slots
    """

    batches_selections = False

    def __init__(self, shape: AttentionShape, kv: Tensor) -> None:
        """``kv``: the slot pool's storage, ``[num_slots, 2, D]``."""
        self.shape = shape
        self.kv = kv
        self.before_layer: Callable[[int], None] = lambda layer: None

    def part_tokens_at(self, position: int) -> int | None:
        """For how many tokens at once a layer of a long chunk is computed.

        Parameters
        ----------
        position : of the chunk's first token

        Returns
        -------
        A number if other steps should run within a layer; ``begin`` gives a ``SplitAttention``
        then. None for whole layers.
        """
        return None

    @abstractmethod
    def begin(self, step: AttentionStep) -> LayerAttention:
        """Prepare one forward pass and return what the model calls in each layer."""
