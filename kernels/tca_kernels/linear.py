"""Matrix products with weights ``[out, in]``, as a model's projections store them."""

from __future__ import annotations

import torch
from torch import Tensor

from tca_kernels import dispatch
from tca_kernels.fused import silu_mul

# Rows up to which reading the weights takes longer on a CPU than multiplying them.
_FEW_ROWS = 32
# Weights below which another CPU thread costs more than it saves.
_THREAD_WEIGHTS = 1 << 15


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Parameters
    ----------
    x : ``[M, K]``
    weight : ``[N, K]``, row-major
    bias : ``[N]``

    Returns
    -------
    ``[M, N]``; for few rows on a CPU in float32, independent of the other rows to the last bit
    """
    if not _few_on_cpu(x):
        return torch.nn.functional.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight)) if bias is None else bias.repeat(len(x), 1)
    _launch(x, weight, out, add=bias is not None)
    return out


def linear_add(target: Tensor, x: Tensor, weight: Tensor) -> None:
    """``target += x @ weight.T`` in place; shapes as in ``linear``."""
    if _few_on_cpu(x):
        _launch(x, weight, target, add=True)
    else:
        target.addmm_(x, weight.t())


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)`` for ``weight [2 I, K]``, the gate first: ``[M, I]``."""
    inner = len(weight) // 2
    if not _few_on_cpu(x) or inner % 2:
        return silu_mul(linear(x, weight))
    from tca_kernels.cpu.linear import gated_kernel

    out = x.new_empty(len(x), inner)
    parts = dispatch.cpu_parts(weight.numel(), _THREAD_WEIGHTS)
    gated_kernel()(x.contiguous().numpy(), weight.numpy(), out.numpy(), parts)
    return out


def _few_on_cpu(x: Tensor) -> bool:
    return len(x) <= _FEW_ROWS and dispatch.use_numba(x)


def _launch(x: Tensor, weight: Tensor, out: Tensor, add: bool) -> None:
    from tca_kernels.cpu.linear import linear_kernel

    parts = dispatch.cpu_parts(weight.numel(), _THREAD_WEIGHTS)
    linear_kernel()(x.contiguous().numpy(), weight.numpy(), out.numpy(), add, parts)
