"""Writes of a step: keys and values into the pool, slots onto the lists."""

from __future__ import annotations

import pytest
import torch

from tca_kernels.append import append_slots, write_kv

BACKENDS = pytest.mark.parametrize("backend", ["reference", "kernel"])


@pytest.fixture
def backend_device(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> torch.device:
    if backend == "reference":
        monkeypatch.setattr("tca_kernels.dispatch.use_triton", lambda tensor: False)
    return device


@BACKENDS
def test_write_kv_touches_its_slots_only(backend_device: torch.device, dtype: torch.dtype) -> None:
    """Rows of a fused projection, with padding."""
    tokens, heads, dim = 11, 3, 64
    fused = torch.randn(tokens, 4 * heads, dim, device=backend_device).to(dtype)
    k, v = fused[:, heads : 2 * heads], fused[:, 2 * heads : 3 * heads]
    pool = torch.randn(100, 2, dim, device=backend_device).to(dtype)
    slots = torch.randperm(100)[: tokens * heads].view(heads, tokens).T.to(torch.int32)
    slots[4] = -1
    expected = pool.clone()
    for t in range(tokens):
        for h in range(heads):
            if slots[t, h] >= 0:
                expected[slots[t, h], 0] = k[t, h]
                expected[slots[t, h], 1] = v[t, h]
    write_kv(k, v, pool, slots.to(backend_device))
    assert torch.equal(pool, expected)


@BACKENDS
def test_write_kv_converts_to_the_pools_dtype(backend_device: torch.device) -> None:
    k, v = torch.randn(2, 5, 2, 16, device=backend_device)
    pool = torch.zeros(20, 2, 16, dtype=torch.float16, device=backend_device)
    slots = torch.arange(10, dtype=torch.int32, device=backend_device).view(5, 2)
    write_kv(k, v, pool, slots)
    assert torch.equal(pool[:10, 0], k.view(10, 16).half())
    assert torch.equal(pool[:10, 1], v.view(10, 16).half())


@BACKENDS
def test_append_grows_every_list_by_one(backend_device: torch.device) -> None:
    """Slots come as a step has them, ``[L, T, Hkv]``; a padding request has none."""
    batch, layers, heads = 5, 4, 3
    length = torch.randint(0, 9, (batch, layers, heads), dtype=torch.int32)
    start = torch.arange(batch * layers * heads).view(length.shape) * 10
    arena = torch.arange(batch * layers * heads * 10, dtype=torch.int32)
    new = torch.randint(0, 10**6, (layers, batch + 2, heads), dtype=torch.int32)
    new[:, 4] = -1
    new_slots = new[:, :batch].transpose(0, 1)
    expected_arena, expected_length = arena.clone(), length.clone()
    for b in range(batch - 1):
        for layer in range(layers):
            for h in range(heads):
                place = start[b, layer, h] + length[b, layer, h]
                expected_arena[place] = new[layer, b, h]
                expected_length[b, layer, h] += 1
    arena, start = arena.to(backend_device), start.to(backend_device)
    length = length.to(backend_device)
    append_slots(arena, start, length, new_slots.to(backend_device))
    assert torch.equal(arena.cpu(), expected_arena)
    assert torch.equal(length.cpu(), expected_length)
