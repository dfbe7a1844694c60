"""Rotation, gated activation and layout copies against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tca_kernels.fused import copy_rows, rms_norm, rotate, silu_mul

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 3, 32), (5, 40, 128), (9, 17, 64)])
def test_rotate(
    tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> None:
    qkv = torch.randn(tokens, heads + 4, head_dim, device=device).to(dtype)
    angle = torch.rand(tokens, 1, head_dim // 2, device=device) * 6
    cos = torch.cat((angle.cos(), angle.cos()), -1).to(dtype)
    sin = torch.cat((-angle.sin(), angle.sin()), -1).to(dtype)
    qk = qkv[:, :heads]
    wide = qk.float().clone()
    expected = wide * cos.float() + wide.roll(head_dim // 2, -1) * sin.float()
    untouched = qkv[:, heads:].clone()
    out = rotate(qk, cos, sin)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(qkv[:, heads:], untouched)


@pytest.mark.parametrize(("tokens", "width"), [(0, 64), (1, 64), (3, 576), (300, 130)])
def test_rms_norm(tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    tolerance = TOLERANCE[dtype]
    out = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("width", "stride"), [(64, 128), (17000, 17000)])
def test_rms_norm_of_what_the_kernel_does_not_take(
    width: int, stride: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Rows with gaps between them, and rows too wide for registers."""
    x = torch.randn(3, stride, device=device).to(dtype)[:, :width]
    weight = torch.randn(width, device=device).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    tolerance = TOLERANCE[dtype]
    out = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (3, 2048), (7, 2052)])
def test_silu_mul(tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
    gate_up = torch.randn(tokens, 2 * width, device=device).to(dtype)
    gate, up = gate_up.float().chunk(2, -1)
    tolerance = TOLERANCE[dtype]
    expected = F.silu(gate) * up
    torch.testing.assert_close(silu_mul(gate_up).float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 9, 3, 128), (3, 5, 2, 7 * 64)])
def test_copy_rows(shape: tuple[int, int, int, int], device: torch.device) -> None:
    outer, rows, inner, width = shape
    wide = torch.randn(outer * rows, (inner + 2) * width, device=device)
    source = wide[:, : inner * width].view(shape)
    target = torch.full((outer, inner, rows, width), torch.nan, device=device)
    copy_rows(source, target.transpose(1, 2))
    assert torch.equal(target.transpose(1, 2), source)
    back = torch.zeros_like(wide)
    copy_rows(target.transpose(1, 2), back[:, : inner * width].view(shape))
    assert torch.equal(back[:, : inner * width], wide[:, : inner * width])
    assert not back[:, inner * width :].any()
