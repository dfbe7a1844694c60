"""Rows between pools: on one device, and between a GPU and pinned host memory."""

from __future__ import annotations

import pytest
import torch

from tca_kernels.move import move_rows


@pytest.mark.parametrize("shape", [(50, 2, 64), (50,)])
def test_rows_move_on_the_cpu(shape: tuple[int, ...]) -> None:
    source, target = torch.randn(shape), torch.zeros(shape)
    source_rows, target_rows = torch.randperm(50)[:20].int(), torch.randperm(50)[:20].int()
    move_rows(source, source_rows, target, target_rows)
    expected = torch.zeros(shape)
    expected[target_rows.long()] = source[source_rows.long()]
    assert torch.equal(target, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("up", [True, False], ids=["to-device", "to-host"])
def test_rows_move_between_device_and_pinned_memory(up: bool) -> None:
    host = torch.randn(300, 2, 128).to(torch.bfloat16).pin_memory()
    device = torch.randn(400, 2, 128, device="cuda").to(torch.bfloat16)
    source, target = (host, device) if up else (device, host)
    source_rows = torch.randperm(300)[:111].int().cuda()
    target_rows = torch.randperm(300)[:111].int().cuda()
    expected = target.cpu().clone()
    expected[target_rows.cpu().long()] = source.cpu()[source_rows.cpu().long()]
    move_rows(source, source_rows, target, target_rows)
    torch.cuda.synchronize()
    assert torch.equal(target.cpu(), expected)
