"""Prefill through torch's fused attention, decode in Triton: CUDA without FlashInfer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from tca_runtime.attention.base import AttentionShape
from tca_runtime.attention.cuda_backend import CudaBackend
from tca_runtime.attention.pieces import Lengths, RaggedPrefill


class SdpaPrefill(RaggedPrefill):
    """Ragged causal attention, one sequence after the other."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, kv_lengths: Lengths
    ) -> Tensor:
        """See ``RaggedPrefill``."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        group = q.shape[1] // k.shape[1]
        queries = q.split(q_lengths.tolist())
        keys, values = k.split(kv_lengths.tolist()), v.split(kv_lengths.tolist())
        parts = zip(queries, keys, values, out.split(q_lengths.tolist()), strict=True)
        for query, key, value, target in parts:
            keys_of, values_of = (
                x.transpose(0, 1)[None].repeat_interleave(group, dim=1) for x in (key, value)
            )
            attended = F.scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                keys_of,
                values_of,
                attn_mask=causal_lower_right(len(query), len(key)),
                scale=self._scale,
            )
            target.copy_(attended[0].transpose(0, 1))
        return out


class TritonBackend(CudaBackend):
    """Needs nothing but torch and Triton, and serves float32 too."""

    def __init__(self, shape: AttentionShape, kv: Tensor) -> None:
        super().__init__(shape, kv, SdpaPrefill(shape.scale))

    @staticmethod
    def unsupported(shape: AttentionShape) -> str | None:
        """Why the backend cannot serve ``shape``, or None."""
        if shape.device.type != "cuda":
            return f"runs on cuda, not on {shape.device.type}"
        if shape.head_dim < 16 or shape.head_dim & (shape.head_dim - 1):
            return f"has kernels for powers of two from 16 on, not for head size {shape.head_dim}"
        return None
