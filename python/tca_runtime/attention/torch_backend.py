"""The readable reference: plain softmax per request and head, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from tca_runtime.attention.base import (
    AttentionBackend,
    AttentionShape,
    AttentionStep,
    LayerAttention,
    PrefillChunk,
    SlotLists,
)


class TorchBackend(AttentionBackend):
    """Gathers every list and computes attention in float32. What other backends must match."""

    @staticmethod
    def unsupported(shape: AttentionShape) -> str | None:
        """Why the backend cannot serve ``shape``; None, because this one can serve every shape."""
        return None

    def begin(self, step: AttentionStep) -> LayerAttention:
        """Read the lists' places once, so that layers need not wait for the device."""
        decode = [PrefillChunk(t, 1, 0, t, None) for t in range(step.num_decode)]
        work: list[tuple[SlotLists, PrefillChunk]] = []
        if step.decode is not None:
            work += [(step.decode, chunk) for chunk in decode]
        if step.prefill is not None:
            work += [(step.prefill, chunk) for chunk in step.chunks]
        places = [
            (lists.start[chunk.index].tolist(), lists.length[chunk.index].tolist())
            for lists, chunk in work
        ]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.before_layer(layer)
            slots = step.new_slots[layer].long()
            self.kv[slots, 0] = k
            self.kv[slots, 1] = v
            if not len(q):
                return q.flatten(1)
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
            for (lists, chunk), (start, length) in zip(work, places, strict=True):
                tokens = slice(chunk.token_start, chunk.token_start + chunk.num_tokens)
                view = None
                if lists is step.prefill and step.choose_view is not None:
                    view = step.choose_view(layer, chunk.index, q[tokens])
                for head in range(self.shape.num_kv_heads):
                    heads = slice(head * self.shape.group, (head + 1) * self.shape.group)
                    first = start[layer][head]
                    entries = lists.arena[first : first + length[layer][head]].long()
                    if view is not None:
                        own = entries[len(entries) - chunk.num_tokens :]
                        entries = torch.cat([view.per_head()[head].long(), own])
                    out[tokens, heads] = _causal_attention(
                        q[tokens, heads], self.kv[entries], self.shape.scale
                    )
            return out.view(len(q), -1)

        return attend


def _causal_attention(q: Tensor, kv: Tensor, scale: float) -> Tensor:
    """Attention of ``q [n, G, D]`` over ``kv [m, 2, D]``, whose last ``n`` rows are ``q``'s own."""
    n, m = len(q), len(kv)
    keys, values = kv.float().unbind(1)
    scores = q.float().transpose(0, 1) @ keys.T * scale
    future = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return (weights @ values).transpose(0, 1).to(q.dtype)
