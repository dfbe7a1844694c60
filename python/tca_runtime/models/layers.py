"""The parts of a decoder layer, as plain callables over flat ``[T, ...]`` tensors.

They hold tensors and no parameters machinery: a decode step of a small model on a CPU has
hundreds of tiny operations, and every one counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tca_kernels.fused import rms_norm, rotate
from tca_kernels.linear import linear, linear_add, linear_silu_mul


@dataclass(frozen=True, slots=True)
class Linear:
    """``x @ weight.T + bias`` with ``weight`` of shape ``[out, in]``."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """``residual += self(x)``, in place and in one pass."""
        linear_add(residual, x, self.weight)
        if self.bias is not None:
            residual.add_(self.bias)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of ``[vocab, hidden]``."""

    table: Tensor

    def __call__(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Root-mean-square norm over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of each query and key head; ``weight`` is ``[Hq + Hkv, D]``."""

    weight: Tensor
    eps: float

    def __call__(self, heads: Tensor) -> Tensor:
        return F.rms_norm(heads, heads.shape[-1:], None, self.eps).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """Query, key and value in one product, RoPE, and the output projection."""

    qkv: Linear
    head_norm: HeadNorm | None
    output: Linear
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[T, Hq, D]``, keys and values ``[T, Hkv, D]`` of normed ``x [T, hidden]``."""
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        # Queries and keys are neighbours, so one rotation serves both.
        qk, v = heads.split((self.num_q_heads + self.num_kv_heads, self.num_kv_heads), 1)
        if self.head_norm is not None:
            qk = self.head_norm(qk)
        q, k = rotate(qk, cos, sin).split((self.num_q_heads, self.num_kv_heads), 1)
        return q, k, v


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """``down(silu(gate(x)) * up(x))`` with gate and up in one product."""

    gate_up: Linear
    down: Linear

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        self.down.add_to(residual, linear_silu_mul(x, self.gate_up.weight))


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Pre-norm attention and MLP, each added to the residual stream in place."""

    input_norm: RMSNorm
    attention: SelfAttention
    mlp_norm: RMSNorm
    mlp: GatedMLP
