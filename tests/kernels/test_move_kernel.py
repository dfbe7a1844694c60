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


def test_a_list_with_a_stride_is_refused() -> None:
    source, target = torch.randn(50, 8), torch.zeros(50, 8)
    column = torch.arange(20, dtype=torch.int32).view(4, 5)[:, 0]
    with pytest.raises(ValueError, match="source_rows must be contiguous"):
        move_rows(source, column, target, torch.arange(4, dtype=torch.int32))


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
