"""The host tier's size, and doing without it."""

from __future__ import annotations

import logging

import pytest
import torch

from tca_runtime.attention.base import AttentionShape
from tca_runtime.config import SparsityArgs
from tca_runtime.engine.memory import host_pool

SHAPE = AttentionShape(2, 4, 2, 16, torch.float32, torch.device("cpu"))
# More than an address space holds.
IMPOSSIBLE_GIB = 1e9


def test_host_pool_has_the_size_asked_for() -> None:
    pool = host_pool(SparsityArgs(host_cache_size=0.001), SHAPE)
    assert pool is not None
    size = pool.kv.numel() * pool.kv.element_size()
    assert 0.9 * 0.001 * (1 << 30) < size <= 0.001 * (1 << 30)
    assert host_pool(SparsityArgs(host_cache_size=0), SHAPE) is None


def test_host_memory_that_cannot_be_had_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert host_pool(SparsityArgs(host_cache_size=IMPOSSIBLE_GIB), SHAPE) is None
    assert "no host tier (cold prefixes are pruned instead)" in caplog.text
