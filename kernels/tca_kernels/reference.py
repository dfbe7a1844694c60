"""Torch implementations of every kernel: the CPU path, and what the Triton kernels must match.

All of them are vectorised over tokens; loops run over requests or rows only.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MIX32_A = 0x7FEB352D
_MIX32_B = 0x846CA68B - 2**32
# The largest float32 below 2**-31: maps 31 random bits into the open interval (0, 1).
_UNIT = float(2.0**-31 * (1 - 2.0**-24))


def _padded_slots(arena: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of non-empty lists ``[H]`` as int64 ``[H, longest]``, and which entries are real.

    Past a list's end its last slot is repeated, so that no foreign slot is ever read.
    """
    index = torch.arange(int(length.max()), device=arena.device)
    slots = arena[start[:, None] + torch.minimum(index, length.long()[:, None] - 1)].long()
    return slots, index < length[:, None]


def decode_attention(
    q: Tensor, kv: Tensor, arena: Tensor, start: Tensor, length: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`tca_kernels.decode.decode_attention`; also returns the log-sum-exp ``[B, Hq]``."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads = start.shape[1]
    out = torch.zeros(batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim, device=q.device)
    lse = torch.full(out.shape[:3], -torch.inf, device=q.device)
    for b in range(batch):
        heads = length[b].nonzero().squeeze(1)
        if not len(heads):
            continue
        slots, valid = _padded_slots(arena, start[b, heads], length[b, heads])
        rows = q[b].float().view(num_kv_heads, -1, head_dim)[heads]
        logits = (rows @ kv[slots, 0].float().transpose(1, 2)) * scale
        logits = logits.masked_fill(~valid[:, None], -torch.inf)
        out[b, heads] = logits.softmax(-1) @ kv[slots, 1].float()
        lse[b, heads] = logits.logsumexp(-1)
    return out.view(q.shape).to(q.dtype), lse.view(batch, num_q_heads)


def probe_scores(
    q: Tensor,
    kv: Tensor,
    arena: Tensor,
    start: Tensor,
    lengths: Tensor,
    counts: Tensor,
    scale: float,
) -> Tensor:
    """See :func:`tca_kernels.score.probe_scores`."""
    items, probes, num_q_heads, head_dim = q.shape
    num_kv_heads = start.shape[1]
    keys_of = kv.view(-1, head_dim)
    # As large as the largest product and used for all of them: pages that are new with every one
    # take a CPU longer than the arithmetic.
    group = num_q_heads // num_kv_heads
    logits = torch.empty(probes * group * int(lengths.max()), device=q.device)
    # Only a list's end hides anything from anyone.
    back = torch.arange(probes, device=q.device).repeat_interleave(group)
    hidden = torch.arange(1 - probes, 0, device=q.device) >= (back + 1 - probes)[:, None]
    scores: list[Tensor] = []
    for n in range(items):
        rows = q[n].float().view(probes, num_kv_heads, group, head_dim) * scale
        for h, (length, count) in enumerate(
            zip(lengths[n].tolist(), counts[n].tolist(), strict=True)
        ):
            slots = arena[start[n, h] :][:length].long()
            keys = keys_of.index_select(0, 2 * slots).float()
            weights = logits[: probes * group * length].view(-1, length)
            torch.mm(rows[:, h].reshape(-1, head_dim), keys.t(), out=weights)
            weights[:, length - probes + 1 :].masked_fill_(hidden, -torch.inf)
            weights.sub_(weights.amax(1, keepdim=True)).exp_()
            share = 1.0 / (weights.sum(1) * len(weights))
            scores.append((share @ weights)[:count])
    return torch.cat(scores)


def block_scores(scores: Tensor, block: int, kind: str) -> Tensor:
    """See :func:`tca_kernels.select.block_scores`."""
    blocks = scores.view(-1, block)
    mass = blocks.sum(-1)
    if kind == "mass":
        return mass
    hhi = blocks.square().sum(-1)
    if kind == "raw-hhi":
        return hhi
    return torch.where(mass > 0, hhi / mass.square(), 0.0)


def block_budgets(
    block_score: Tensor,
    row_blocks: Tensor,
    level_counts: Tensor,
    levels: tuple[int, ...],
    descending: bool,
) -> Tensor:
    """Tokens that each block keeps, int64 ``[blocks]``."""
    device = block_score.device
    row = torch.repeat_interleave(torch.arange(len(row_blocks)), row_blocks).to(device)
    # Two stable sorts order the blocks by row, then score, then index.
    order = block_score.argsort(stable=True, descending=descending)
    order = order[row[order].argsort(stable=True)]
    by_rank = torch.tensor(levels).repeat(len(row_blocks)).repeat_interleave(level_counts.flatten())
    keep = torch.empty_like(order)
    keep[order] = by_rank.to(device)
    return keep


def select(
    scores: Tensor,
    block_score: Tensor,
    row_blocks: Tensor,
    level_counts: Tensor,
    levels: tuple[int, ...],
    descending: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`tca_kernels.select.select`; returns (indices, dropped mass)."""
    block = scores.numel() // block_score.numel() if block_score.numel() else 1
    keep = block_budgets(block_score, row_blocks, level_counts, levels, descending)
    blocks = scores.view(-1, block)
    best = blocks.argsort(dim=1, stable=True, descending=True)
    rank = torch.empty_like(best)
    rank.scatter_(1, best, torch.arange(block, device=scores.device).expand_as(best))
    kept = rank < keep[:, None]

    row_tokens = row_blocks * block
    row = torch.repeat_interleave(torch.arange(len(row_blocks)), row_blocks).to(scores.device)
    row_start = (row_tokens.cumsum(0) - row_tokens).to(scores.device)
    flat = kept.flatten().nonzero().squeeze(1)
    indices = (flat - row_start[row[flat // block]]).to(torch.int32)
    dropped = torch.zeros(len(row_blocks), dtype=torch.float32, device=scores.device)
    dropped.index_add_(0, row, blocks.masked_fill(kept, 0.0).sum(1))
    return indices, dropped


def view_slots(
    arena: Tensor,
    start: Tensor,
    candidates: Tensor,
    lengths: Tensor,
    indices: Tensor,
    indptr: Tensor,
) -> Tensor:
    """See :func:`tca_kernels.gather.view_slots`."""
    parts: list[Tensor] = []
    first = start.flatten().tolist()
    bounds = indptr.tolist()
    for row, (n, length) in enumerate(
        zip(candidates.flatten().tolist(), lengths.flatten().tolist(), strict=True)
    ):
        parts.append(arena[first[row] + indices[bounds[row] : bounds[row + 1]].long()])
        parts.append(arena[first[row] + n : first[row] + length])
    return torch.cat(parts)


def write_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """See :func:`tca_kernels.append.write_kv`."""
    real = slots >= 0
    target = slots[real].long()
    kv[target, 0] = k[real].to(kv.dtype)
    kv[target, 1] = v[real].to(kv.dtype)


def append_slots(arena: Tensor, start: Tensor, length: Tensor, new_slots: Tensor) -> None:
    """See :func:`tca_kernels.append.append_slots`."""
    real = new_slots >= 0
    arena[(start + length)[real]] = new_slots[real]
    length += real.to(length.dtype)


def keep_top_p(scores: Tensor, p: Tensor) -> None:
    """See :func:`tca_kernels.sample.keep_top_p`."""
    width = scores.shape[1]
    scores.masked_fill_(scores < top_p_cutoff(largest(scores, width), width, p), -torch.inf)


def largest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` largest scores of each row of ``[N, V]``, best first."""
    if scores.device.type == "cpu":
        # NumPy's vectorised sort of a whole vocabulary beats even torch's topk of a few tokens.
        ascending = torch.from_numpy(np.sort(scores.numpy(), axis=-1))
        return ascending[:, -count:].flip(-1)
    return scores.topk(count).values


def top_p_cutoff(best: Tensor, k: Tensor | int, p: Tensor) -> Tensor:
    """The least score of the smallest set of best ones that holds ``p`` of what top-k leaves.

    Parameters
    ----------
    best : float32 ``[N, n]``, each row's largest scores, best first
    k : int64 ``[N, 1]``, or of all rows, at most n
    p : float32 ``[N, 1]``; above 1 keeps everything that top-k keeps

    Returns
    -------
    float32 ``[N, 1]``
    """
    inside = torch.arange(best.shape[1], device=best.device) < k
    probs = torch.where(inside, best, -torch.inf).softmax(-1)
    better = probs.cumsum(-1) - probs
    num_kept = ((better < p) & inside).sum(-1, keepdim=True)
    # Rows of NaN keep nothing, and an index of -1 would be an error of the whole batch.
    return best.gather(1, (num_kept - 1).clamp_(min=0))


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token of every row.

    Parameters
    ----------
    keys : int32 ``[N, 2]``

    Returns
    -------
    float32 ``[N, vocab_size]``, all finite
    """
    bits = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) + keys[:, :1]
    _xor_shift(bits, 16).mul_(_MIX32_A)
    _xor_shift(bits, 15).add_(keys[:, 1:]).mul_(_MIX32_B)
    _xor_shift(bits, 16).bitwise_and_(0x7FFFFFFF)
    # log1p keeps the full resolution of small uniforms, which make the large noise values.
    exponential = bits.float().add_(0.5).mul_(-_UNIT).log1p_().neg_()
    return exponential.log_().neg_()


def _xor_shift(x: Tensor, by: int) -> Tensor:
    # torch shifts int32 arithmetically: the mask makes it logical.
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (32 - by)) - 1))
