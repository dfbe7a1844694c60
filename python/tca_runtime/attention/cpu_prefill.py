"""Attention of many queries at once on the CPU, built on torch's flash attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tca_runtime.attention.base import SlotLists


class RequestLists:
    """One request's slot lists, their places read into host integers."""

    def __init__(self, lists: SlotLists, index: int, without: int = 0) -> None:
        """``without``: entries to leave out at the end of every list."""
        self._arena = lists.arena
        self._start: list[list[int]] = lists.start[index].tolist()
        self._length: list[list[int]] = (lists.length[index] - without).tolist()

    def slots(self, layer: int) -> list[Tensor]:
        """Per KV head, the listed slots: int32."""
        places = zip(self._start[layer], self._length[layer], strict=True)
        return [self._arena[start : start + length] for start, length in places]


def attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, past: Sequence[Tensor], scale: float
) -> Tensor:
    """Attend from a chunk's tokens to the request's past and, causally, to the chunk itself.

    Parameters
    ----------
    q : ``[n, Hq, D]``
    k, v : ``[n, Hkv, D]``
    kv : ``[num_slots, 2, D]``
    past : per KV head, int32 slots of the list without the chunk's own

    Returns
    -------
    ``[n, Hq, D]``
    """
    n, num_kv_heads, head_dim = k.shape
    queries = q.reshape(n, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    shared = (-1, queries.shape[1], -1, -1)
    out, lse = _flash(
        queries,
        k.transpose(0, 1)[:, None].expand(shared),
        v.transpose(0, 1)[:, None].expand(shared),
        causal=True,
        scale=scale,
    )
    if any(len(slots) for slots in past):
        # No mask separates the queries of the past part, so a head's group can be one long run.
        rows = queries.reshape(num_kv_heads, -1, head_dim)
        past_out, past_lse = attend_slots(rows, kv, past, scale)
        share = torch.sigmoid(past_lse.view(lse.shape) - lse)[..., None]
        out = out.float().lerp_(past_out.view(out.shape).float(), share)
    return out.permute(2, 0, 1, 3).reshape(q.shape).to(q.dtype)


def attend_slots(
    rows: Tensor, kv: Tensor, slots: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from each KV head's ``rows`` to all of its slots.

    Returns
    -------
    Outputs like ``rows [Hkv, R, D]``, and their float32 log-sum-exp ``[Hkv, R]``, which is
    minus infinity where a head has no slots.
    """
    sizes = [len(head_slots) for head_slots in slots]
    gathered = kv.flatten(1).index_select(0, torch.cat(tuple(slots))).view(-1, *kv.shape[1:])
    if min(sizes) == max(sizes):
        keys, values = gathered.view(len(sizes), -1, *kv.shape[1:]).unbind(2)
        out, lse = _flash(rows[:, None], keys[:, None], values[:, None], causal=False, scale=scale)
        return out[:, 0], lse[:, 0]
    outs = torch.zeros_like(rows)
    lses = torch.full(rows.shape[:2], -torch.inf)
    for head, entries in enumerate(torch.split(gathered, sizes)):
        if len(entries):
            keys, values = entries.unbind(1)
            out, lse = _flash(
                rows[head, None, None], keys[None, None], values[None, None], False, scale
            )
            outs[head], lses[head] = out[0, 0], lse[0, 0]
    return outs, lses


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """``[B, H, n, D]`` attention with its log-sum-exp ``[B, H, n]``, which SDPA does not return."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scale
    )
    return out, lse
