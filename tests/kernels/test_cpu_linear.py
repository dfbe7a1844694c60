"""Projections of few rows against float64 products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tca_kernels.linear import linear, linear_add, linear_silu_mul

# (rows, inputs, outputs): both sides of the limit for few rows, odd rows, outputs beyond quads,
# and enough weights for several threads.
SIZES = [(1, 64, 8), (2, 33, 7), (3, 576, 130), (32, 96, 512), (33, 64, 10)]


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().T


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    x = torch.randn(rows, inputs).to(dtype)
    weight = torch.randn(outputs, inputs).to(dtype)
    offset = torch.randn(outputs).to(dtype) if bias else None
    expected = product(x, weight) + (offset.double() if offset is not None else 0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    out = linear(x, weight, offset)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_linear_of_strided_rows(rows: int, inputs: int, outputs: int) -> None:
    x = torch.randn(rows, inputs + 3)[:, 1:-2]
    weight = torch.randn(outputs, inputs)
    expected = product(x, weight).float()
    torch.testing.assert_close(linear(x, weight), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_linear_add(rows: int, inputs: int, outputs: int) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    target = torch.randn(rows, outputs)
    expected = (target.double() + product(x, weight)).float()
    linear_add(target, x, weight)
    torch.testing.assert_close(target, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "inputs", "inner"), SIZES)
def test_linear_silu_mul(rows: int, inputs: int, inner: int) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(2 * inner, inputs)
    gate, up = product(x, weight).chunk(2, -1)
    expected = (F.silu(gate) * up).float()
    torch.testing.assert_close(linear_silu_mul(x, weight), expected, atol=2e-3, rtol=1e-4)


def test_rows_do_not_depend_on_the_batch() -> None:
    x, weight = torch.randn(32, 576), torch.randn(2 * 768, 576)
    together, gated = linear(x, weight), linear_silu_mul(x, weight)
    for size in (1, 2, 3, 7):
        for begin in (0, 5, 32 - size):
            rows = slice(begin, begin + size)
            assert torch.equal(linear(x[rows], weight), together[rows])
            assert torch.equal(linear_silu_mul(x[rows], weight), gated[rows])
