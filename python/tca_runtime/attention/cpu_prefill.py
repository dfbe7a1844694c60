"""Attention of many queries at once on the CPU, built on torch's flash attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class Gathered:
    """Keys and values of one layer's lists, one KV head after the other.

    Attributes
    ----------
    entries : ``[sum(sizes), 2, D]``
    sizes : per head, entries of its list
    """

    entries: Tensor
    sizes: list[int]

    @staticmethod
    def of(kv: Tensor, slots: Sequence[Tensor]) -> Gathered:
        """Copy what ``slots`` (per KV head, int32) list out of ``kv [num_slots, 2, D]``."""
        rows = kv.flatten(1).index_select(0, torch.cat(tuple(slots)))
        return Gathered(rows.view(-1, *kv.shape[1:]), [len(head_slots) for head_slots in slots])


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, past: Gathered, scale: float) -> Tensor:
    """Attend from a chunk's tokens to the request's past and, causally, to the chunk itself.

    Parameters
    ----------
    q : ``[n, Hq, D]``
    k, v : ``[n, Hkv, D]``
    past : the lists without the chunk's own tokens

    Returns
    -------
    ``[n, Hq, D]``
    """
    return attend_run(q, k, v, past, scale, 0, len(q))


def attend_run(
    q: Tensor, k: Tensor, v: Tensor, past: Gathered, scale: float, begin: int, end: int
) -> Tensor:
    """What ``attend_chunk`` returns for the chunk's tokens ``begin`` to ``end``."""
    run = slice(begin, end)
    own = _attend_causal(q[run], k[run], v[run], scale)
    has_past = bool(len(past.entries))
    if begin or has_past:
        rows = _by_head(q[run], k.shape[1]).reshape(k.shape[1], -1, k.shape[2])
    if begin:
        keys, values = k[:begin].transpose(0, 1)[:, None], v[:begin].transpose(0, 1)[:, None]
        out, lse = _flash(rows[:, None], keys, values, causal=False, scale=scale)
        own = _merged(own, out, lse)
    if has_past:
        own = _merged(own, *attend_past(rows, past, scale))
    return own[0].permute(2, 0, 1, 3).reshape(q[run].shape).to(q.dtype)


def attend_past(rows: Tensor, past: Gathered, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from each KV head's ``rows`` to its whole list.

    Returns
    -------
    Outputs like ``rows [Hkv, R, D]``, and their float32 log-sum-exp ``[Hkv, R]``, which is
    minus infinity where a head's list is empty.
    """
    sizes = past.sizes
    if min(sizes) == max(sizes):
        keys, values = past.entries.view(len(sizes), -1, *past.entries.shape[1:]).unbind(2)
        out, lse = _flash(rows[:, None], keys[:, None], values[:, None], causal=False, scale=scale)
        return out[:, 0], lse[:, 0]
    outs = torch.zeros_like(rows)
    lses = torch.full(rows.shape[:2], -torch.inf)
    for head, entries in enumerate(torch.split(past.entries, sizes)):
        if len(entries):
            keys, values = entries.unbind(1)
            out, lse = _flash(
                rows[head, None, None], keys[None, None], values[None, None], False, scale
            )
            outs[head], lses[head] = out[0, 0], lse[0, 0]
    return outs, lses


def _by_head(q: Tensor, num_kv_heads: int) -> Tensor:
    """``[n, Hq, D]`` as ``[Hkv, G, n, D]``."""
    return q.reshape(len(q), num_kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)


def _attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``[Hkv, G, n, D]`` attention of tokens to one another, with its log-sum-exp."""
    queries = _by_head(q, k.shape[1])
    shared = (-1, queries.shape[1], -1, -1)
    keys, values = k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None]
    return _flash(queries, keys.expand(shared), values.expand(shared), causal=True, scale=scale)


def _merged(own: tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from that over each.

    No mask separates the queries of ``out``, so a head's group may be one long run there.
    """
    mine, my_lse = own
    other = lse.view(my_lse.shape)
    share = torch.sigmoid(other - my_lse)[..., None]
    merged = mine.float().lerp_(out.view(mine.shape).float(), share)
    return merged, torch.logaddexp(my_lse, other)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """``[B, H, n, D]`` attention with its log-sum-exp ``[B, H, n]``, which SDPA does not return."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scale
    )
    return out, lse
