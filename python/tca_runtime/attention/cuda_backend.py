"""Attention on CUDA: the Triton kernel decodes in place, gathered views are prefilled.

KV heads are batch entries of the prefill kernel: heads keep different slots, so each attends to
keys and values of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tca_kernels import dispatch
from tca_kernels.append import write_kv
from tca_kernels.decode import DecodeWorkspace, decode_attention
from tca_kernels.gather import gather_views, whole_lists
from tca_runtime.attention.base import (
    AttentionBackend,
    AttentionShape,
    AttentionStep,
    LayerAttention,
    PieceLists,
    PrefillChunk,
    SlotLists,
    ViewChooser,
)
from tca_runtime.attention.pieces import Lengths, Pieces, RaggedPrefill

INITIAL_BATCH = 64
"""Decode requests that the first workspace holds; it grows when a step has more."""

Lists = Callable[[int, Tensor], PieceLists]


class CudaBackend(AttentionBackend):
    """Decode over slot lists in place, prefill over gathered ones.

    Without Triton (tests on a CPU) the kernels' references stand in.

    Decode reads every length on the device and can be captured in a CUDA graph.
    """

    batches_selections = True

    def __init__(self, shape: AttentionShape, kv: Tensor, prefill: RaggedPrefill) -> None:
        super().__init__(shape, kv)
        self._prefill = prefill
        self._compiled = dispatch.use_triton(kv)
        self._workspaces = [self._workspace(INITIAL_BATCH)] if self._compiled else []

    def begin(self, step: AttentionStep) -> LayerAttention:
        """Plan the decode kernel, lay out the chunks' lists; nothing here waits for the device."""
        decode = step.decode
        workspace = self._plan(decode) if decode is not None and self._compiled else None
        work = self._prefill_work(step)
        new_slots, num_decode = step.new_slots, step.num_decode

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.before_layer(layer)
            write_kv(k, v, self.kv, new_slots[layer])
            if not len(q):
                return q.flatten(1)
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            if decode is not None:
                decode_attention(
                    q[:num_decode],
                    self.kv,
                    decode.arena,
                    decode.start[:, layer],
                    decode.length[:, layer],
                    self.shape.scale,
                    workspace=workspace,
                    layer=layer,
                    out=out[:num_decode],
                )
            for attend_chunks in work:
                attend_chunks(layer, q, k, v, out)
            return out.view(len(q), -1)

        return attend

    def _plan(self, lists: SlotLists) -> DecodeWorkspace:
        entries = len(lists.length) * self.shape.num_kv_heads
        if entries > self._workspaces[-1].max_entries:
            # The smaller ones stay: captured graphs hold their addresses.
            self._workspaces.append(self._workspace(2 * len(lists.length)))
        workspace = next(w for w in self._workspaces if w.max_entries >= entries)
        workspace.plan(lists.length)
        return workspace

    def _workspace(self, max_batch: int) -> DecodeWorkspace:
        s = self.shape
        heads = (s.num_q_heads, s.num_kv_heads, s.head_dim)
        return DecodeWorkspace(max_batch, s.num_layers, *heads, self.kv.dtype, self.kv.device)

    def _prefill_work(
        self, step: AttentionStep
    ) -> list[Callable[[int, Tensor, Tensor, Tensor, Tensor], None]]:
        """One callable per group of chunks that find their lists in the same way."""
        batch = step.choose_views
        chosen = batch.chunks if batch is not None else frozenset()
        rest = [chunk for i, chunk in enumerate(step.chunks) if i not in chosen]
        work: list[Callable[[int, Tensor, Tensor, Tensor, Tensor], None]] = []
        if batch is not None:
            work.append(self._gathered(Pieces.of(batch.pieces), batch))
        if step.choose_view is not None and rest:
            for number, chunk in enumerate(step.chunks):
                lists = self._one_view(step, chunk, number, step.choose_view)
                work.append(self._gathered(Pieces.of([_span(chunk)]), lists))
            return work
        fresh = [chunk for chunk in rest if chunk.position == 0]
        if fresh:
            work.append(self._straight([_span(c) for c in fresh]))
        later = [chunk for chunk in rest if chunk.position != 0]
        if later and step.prefill is not None:
            lists = self._whole_past(step.prefill, later)
            work.append(self._gathered(Pieces.of([_span(c) for c in later]), lists))
        return work

    def _straight(
        self, spans: Sequence[tuple[int, int]]
    ) -> Callable[[int, Tensor, Tensor, Tensor, Tensor], None]:
        """Prompts without a past need no lists: their keys and values are at hand."""
        lengths = Pieces.of(spans).lengths
        begin = spans[0][0]
        adjacent = begin + int(lengths.sum()) == sum(spans[-1])
        index: slice | Tensor = slice(begin, sum(spans[-1]))
        if not adjacent:
            runs = [torch.arange(s, s + n) for s, n in spans]
            index = dispatch.upload(torch.cat(runs), self.kv.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
            rows = (q[index], k[index].contiguous(), v[index].contiguous())
            out[index] = self._prefill(*rows, lengths, lengths)

        return attend

    def _gathered(
        self, pieces: Pieces, lists: Lists
    ) -> Callable[[int, Tensor, Tensor, Tensor, Tensor], None]:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
            views = lists(layer, q)
            keys, values = gather_views(self.kv, views.slots)
            self._prefill.attend_pieces(q, keys, values, pieces, views.lengths, out)

        return attend

    def _whole_past(self, lists: SlotLists, chunks: Sequence[PrefillChunk]) -> Lists:
        """Lists of all layers of chunks that attend to everything, laid out at once."""
        lengths = np.stack([_lengths(lists, chunk) for chunk in chunks], axis=1)
        index = torch.tensor([chunk.index for chunk in chunks])
        index = dispatch.upload(index, lists.start.device)
        start = lists.start[index].transpose(0, 1).contiguous()
        slots = whole_lists(lists.arena, start, torch.from_numpy(lengths))
        ends = lengths.sum(axis=(1, 2)).cumsum()
        layers = slots.split(np.diff(ends, prepend=0).tolist())
        return lambda layer, q: PieceLists(layers[layer], lengths[layer])

    def _one_view(
        self, step: AttentionStep, chunk: PrefillChunk, number: int, choose: ViewChooser
    ) -> Lists:
        """A chunk whose view is chosen by a policy that looks at one layer's lists at a time."""
        tokens = slice(chunk.token_start, chunk.token_start + chunk.num_tokens)
        assert step.prefill is not None
        whole = self._whole_past(step.prefill, [chunk])

        def lists(layer: int, q: Tensor) -> PieceLists:
            view = choose(layer, number, q[tokens])
            if view is None:
                return whole(layer, q)
            own = step.new_slots[layer, tokens].t()
            parts = [part for pair in zip(view.per_head(), own, strict=True) for part in pair]
            return PieceLists(torch.cat(parts), (view.lengths + chunk.num_tokens)[None])

        return lists


def _span(chunk: PrefillChunk) -> tuple[int, int]:
    return chunk.token_start, chunk.num_tokens


def _lengths(lists: SlotLists, chunk: PrefillChunk) -> Lengths:
    if chunk.lengths is not None:
        return chunk.lengths
    return np.asarray(lists.length[chunk.index].cpu().numpy().astype(np.int64))
