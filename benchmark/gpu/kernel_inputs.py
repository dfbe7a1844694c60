"""Random inputs of realistic shapes: ragged heads, scattered slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Attention shape of a model."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int


LLAMA_8B = Shape(32, 8, 128)
QWEN_7B = Shape(28, 4, 128)


@dataclass(frozen=True)
class DecodeInputs:
    """Lists of several layers; ``kept_bytes`` is K and V of one layer, on average."""

    q: Tensor
    arena: Tensor
    start: Tensor
    length: Tensor
    kept_bytes: float


def kept_lengths(
    layers: int, batch: int, heads: int, context: int, kept: float, window: int
) -> Tensor:
    """Lengths ``[B, L, Hkv]`` whose average is ``kept``, spread over heads like a calibration."""
    if kept >= 1:
        return torch.full((batch, layers, heads), context, dtype=torch.int32)
    spread = torch.randn(layers, heads).mul(0.6).exp()
    candidates = context - window
    share = (kept * context - window) / candidates
    ratio = (spread / spread.mean() * share).clamp(0.02, 1.0)
    # Clamping moved the mean; shift what is left of it into the heads that have room.
    ratio = (ratio * share / ratio.mean()).clamp(max=1.0)
    length = (ratio * candidates).int() + window
    return length.expand(batch, layers, heads).contiguous()


def decode_inputs(
    shape: Shape,
    kv: Tensor,
    length: Tensor,
    scattered: bool = True,
) -> DecodeInputs:
    """Lists over the pool: slots at random, or ascending with gaps as selection leaves them."""
    total = int(length.sum())
    sizes = length.flatten().long()
    start = (sizes.cumsum(0) - sizes).view(length.shape)
    order = torch.randperm(kv.shape[0], device=kv.device)[:total]
    arena = (order if scattered else order.sort().values).to(torch.int32)
    q = torch.randn(length.shape[0], shape.num_q_heads, shape.head_dim, device=kv.device)
    return DecodeInputs(
        q.to(kv.dtype),
        arena,
        start.to(kv.device),
        length.to(kv.device),
        total * kv[0].numel() * kv.element_size() / length.shape[1],
    )


def level_counts(row_blocks: Tensor, levels: tuple[int, ...], kept: float) -> Tensor:
    """Blocks per level with a log-Gaussian profile whose kept ratio is about ``kept``."""
    log_k = torch.arange(len(levels), dtype=torch.float64)
    low, high = -8.0, 2.0 * len(levels)
    for _ in range(60):
        mu = (low + high) / 2
        weight = (-((log_k - mu) ** 2) / 8).exp()
        weight /= weight.sum()
        ratio = float((weight * torch.tensor(levels)).sum()) / levels[-1]
        low, high = (mu, high) if ratio < kept else (low, mu)
    ends = (weight.cumsum(0) * row_blocks[:, None]).round().long()
    ends[:, -1] = row_blocks
    return ends.diff(dim=1, prepend=torch.zeros(len(row_blocks), 1, dtype=torch.int64))
