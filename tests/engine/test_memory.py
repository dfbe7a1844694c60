"""The host tier's size, and doing without it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from tca_runtime.attention.base import AttentionShape
from tca_runtime.config import CacheArgs, SparsityArgs
from tca_runtime.engine.memory import HOST_LIST_BYTES, host_pool, host_slots, pool_tokens

SHAPE = AttentionShape(2, 4, 2, 16, torch.float32, torch.device("cpu"))
# More than an address space holds.
IMPOSSIBLE_GIB = 1e9


def test_host_pool_has_the_size_asked_for() -> None:
    pool = host_pool(host_slots(SparsityArgs(host_cache_size=0.001), SHAPE), SHAPE)
    assert pool is not None
    size = pool.kv.numel() * pool.kv.element_size()
    assert 0.9 * 0.001 * (1 << 30) < size <= 0.001 * (1 << 30)
    assert host_slots(SparsityArgs(host_cache_size=0), SHAPE) == 0
    assert host_pool(0, SHAPE) is None


def test_host_memory_that_cannot_be_had_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        slots = host_slots(SparsityArgs(host_cache_size=IMPOSSIBLE_GIB), SHAPE)
        assert host_pool(slots, SHAPE) is None
    assert "no host tier (cold prefixes are pruned instead)" in caplog.text


def test_lists_of_the_host_tier_are_paid_from_device_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are on the device, and grow as the tier fills: the pool must leave them their room."""
    shape = replace(SHAPE, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    args = CacheArgs(mem_fraction=0.5)
    alone, beside = (pool_tokens(args, shape, host_slots=slots) for slots in (0, 1 << 24))
    per_token = (1 << 29) / alone
    assert (alone - beside) * per_token == pytest.approx(HOST_LIST_BYTES << 24, rel=0.01)
