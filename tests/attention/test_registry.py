"""Which backend ``create_backend`` returns, and what it says when it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tca_runtime.attention import create_backend, registry
from tca_runtime.attention.cpu_backend import CpuBackend
from tca_runtime.attention.torch_backend import TorchBackend
from tests.attention.steps import make_shape

SHAPE = make_shape(3, 64)
KV = torch.zeros(8, 2, 64)


def test_auto_prefers_the_fast_backend_on_the_cpu() -> None:
    assert isinstance(create_backend("auto", SHAPE, KV), CpuBackend)


def test_named_backend() -> None:
    assert isinstance(create_backend("torch", SHAPE, KV), TorchBackend)


def test_auto_falls_back_where_the_fast_backend_refuses() -> None:
    elsewhere = dataclasses.replace(SHAPE, device=torch.device("meta"))
    assert isinstance(create_backend("auto", elsewhere, KV), TorchBackend)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown attention backend 'fast'.*auto, .*cpu, .*torch"):
        create_backend("fast", SHAPE, KV)


def test_refusal_names_the_reason() -> None:
    elsewhere = dataclasses.replace(SHAPE, device=torch.device("meta"))
    with pytest.raises(ValueError, match="no attention backend accepts .*cpu runs on cpu, not on"):
        create_backend("cpu", elsewhere, KV)


def test_missing_dependency_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> registry.Candidate:
        raise ImportError("No module named 'fastlib'")

    monkeypatch.setattr(registry, "_CANDIDATES", {"fast": broken})
    with pytest.raises(ValueError, match="fast cannot be imported: No module named 'fastlib'"):
        create_backend("auto", SHAPE, KV)
