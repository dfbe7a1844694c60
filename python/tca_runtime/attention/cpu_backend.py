"""Attention on the CPU: a compiled kernel decodes in place, torch's flash attention prefills."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tca_kernels.cpu.decode import decode_kernel
from tca_kernels.cpu.huge_pages import advise_huge_pages
from tca_kernels.cpu.jit import use_threads
from tca_kernels.cpu.write import write_kernel
from tca_runtime.attention.base import (
    AttentionBackend,
    AttentionShape,
    AttentionStep,
    PrefillChunk,
    SlotLists,
    SplitAttention,
    ViewChooser,
)
from tca_runtime.attention.cpu_prefill import (
    Gathered,
    RequestLists,
    attend_chunk,
    attend_past,
    attend_run,
)

logger = logging.getLogger(__name__)

SLOTS_PER_THREAD = 256
"""Another thread pays off from this many slots per layer."""

# Up to so many earlier tokens a part has its full size; beyond, its time would grow with them.
FULL_PART_SEES = 8192
# Smaller parts cost more than they hide.
LEAST_PART = 64

DecodeLayer = Callable[[int, Tensor, Tensor], None]
WriteLayer = Callable[[int, Tensor, Tensor], None]


class CpuBackend(AttentionBackend):
    """Fast attention over float32 pools; pools of other types decode by gathering.

    Creating a backend compiles the kernels for its head size, which takes seconds the first time;
    later processes load them from numba's cache.
    """

    # Enough for products as fast as a whole chunk's, few enough to end soon.
    part_tokens = 512

    def __init__(self, shape: AttentionShape, kv: Tensor) -> None:
        super().__init__(shape, kv)
        advise_huge_pages(kv)
        self.compiled = kv.dtype == torch.float32
        if self.compiled:
            begin = time.perf_counter()
            self._pool = kv.numpy()
            self._decode_kernel = decode_kernel(shape.head_dim)
            self._write_kernel = write_kernel()
            logger.info("CPU attention kernels ready in %.1f s", time.perf_counter() - begin)

    def part_tokens_at(self, position: int) -> int:
        """See ``AttentionBackend``: fewer tokens where each of them sees more."""
        seen = max(FULL_PART_SEES, position)
        return max(LEAST_PART, self.part_tokens * FULL_PART_SEES // seen)

    @staticmethod
    def unsupported(shape: AttentionShape) -> str | None:
        """Why the backend cannot serve ``shape``, or None."""
        return None if shape.device.type == "cpu" else f"runs on cpu, not on {shape.device.type}"

    def begin(self, step: AttentionStep) -> SplitAttention:
        """Read lists and lengths once, so that a layer only passes arrays to kernels."""
        decode: DecodeLayer | None = None
        if step.decode is not None:
            lists = step.decode
            decode = self._in_place_decode(lists) if self.compiled else self._gather_decode(lists)
        prefill: list[tuple[slice, RequestLists]] = []
        if step.prefill is not None:
            prefill = [_past(step.prefill, chunk) for chunk in step.chunks]
        write = self._writer(step.new_slots)
        return CpuAttention(self.kv, self.shape.scale, write, decode, prefill, step.choose_view)

    def _writer(self, new_slots: Tensor) -> WriteLayer:
        if self.compiled:
            slots = new_slots.numpy().view(np.uint32)
            return lambda layer, k, v: self._write_kernel(
                self._pool, slots[layer], k.numpy(), v.numpy()
            )
        rows = new_slots.long()

        def write(layer: int, k: Tensor, v: Tensor) -> None:
            self.kv[rows[layer], 0] = k
            self.kv[rows[layer], 1] = v

        return write

    def _in_place_decode(self, lists: SlotLists) -> DecodeLayer:
        slots_per_layer = int(lists.length.sum(dim=(0, 2)).max())
        threads = use_threads(min(torch.get_num_threads(), 1 + slots_per_layer // SLOTS_PER_THREAD))
        group, head_dim = self.shape.group, self.shape.head_dim
        values = np.empty((threads, 2, group, head_dim), np.float32)
        weights = np.empty((threads, 2, 2, group), np.float32)
        arena = lists.arena.numpy().view(np.uint32)
        start, length = lists.start.numpy(), lists.length.numpy()

        def decode(layer: int, q: Tensor, out: Tensor) -> None:
            self._decode_kernel(
                self._pool,
                arena,
                start,
                length,
                layer,
                q.numpy(),
                self.shape.scale,
                out.numpy(),
                values,
                weights,
            )

        return decode

    def _gather_decode(self, lists: SlotLists) -> DecodeLayer:
        requests = [RequestLists(lists, b) for b in range(len(lists.start))]

        def decode(layer: int, q: Tensor, out: Tensor) -> None:
            for b, request in enumerate(requests):
                rows = q[b].reshape(self.shape.num_kv_heads, self.shape.group, -1)
                past = Gathered.of(self.kv, request.slots(layer))
                attended, _ = attend_past(rows, past, self.shape.scale)
                out[b] = attended.reshape(out[b].shape)

        return decode


@dataclass(frozen=True)
class CpuAttention:
    """The attention of one forward pass (``SplitAttention``).

    Attributes
    ----------
    kv : the pool's ``[num_slots, 2, D]``
    prefill : each chunk's place on the token axis, and its request's lists without the chunk
    """

    kv: Tensor
    scale: float
    write: WriteLayer
    decode: DecodeLayer | None
    prefill: Sequence[tuple[slice, RequestLists]]
    choose_view: ViewChooser | None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``LayerAttention``."""
        self.write(layer, k, v)
        if not len(q):
            return q.flatten(1)
        out = torch.empty(q.shape, dtype=q.dtype)
        if self.decode is not None:
            self.decode(layer, q, out)
        for index, (tokens, _) in enumerate(self.prefill):
            past = self._seen(layer, index, q[tokens])
            out[tokens] = attend_chunk(q[tokens], k[tokens], v[tokens], past, self.scale)
        return out.view(len(q), -1)

    def split(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Callable[[int, int], Tensor]:
        """See ``SplitAttention``."""
        assert self.decode is None and len(self.prefill) == 1
        self.write(layer, k, v)
        past = self._seen(layer, 0, q)
        return lambda begin, end: attend_run(q, k, v, past, self.scale, begin, end).view(
            end - begin, -1
        )

    def _seen(self, layer: int, index: int, queries: Tensor) -> Gathered:
        view = self.choose_view(layer, index, queries) if self.choose_view else None
        slots = self.prefill[index][1].slots(layer) if view is None else view.per_head()
        return Gathered.of(self.kv, slots)


def _past(lists: SlotLists, chunk: PrefillChunk) -> tuple[slice, RequestLists]:
    """A chunk's place on the token axis, and its request's lists without the chunk."""
    tokens = slice(chunk.token_start, chunk.token_start + chunk.num_tokens)
    return tokens, RequestLists(lists, chunk.index, without=chunk.num_tokens)
