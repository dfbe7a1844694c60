"""Calibration measures the same whichever backend computes the prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tca_runtime.attention.triton_backend import TritonBackend
from tca_runtime.calibration.calibrator import Calibrator
from tca_runtime.calibration.observer import Totals
from tca_runtime.config import ModelArgs
from tests.gpu.tiny import write_model

LENGTH = 2900


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def expected(model: Path) -> Totals:
    return measure(calibrator(model, "cpu"))


def calibrator(model: Path, device: str) -> Calibrator:
    args = ModelArgs(model_path=str(model), device=device, dtype="float32")
    return Calibrator(args, LENGTH)


def measure(calibrating: Calibrator) -> Totals:
    return calibrating.measure(np.random.default_rng(0).integers(0, 256, LENGTH).astype(np.int32))


def assert_same(found: Totals, expected: Totals) -> None:
    assert found.chunks.tolist() == expected.chunks.tolist() == [1, 2]
    assert expected.mass.min() < 0.9 * expected.mass.max()
    np.testing.assert_allclose(found.mass, expected.mass, atol=1e-3)
    np.testing.assert_allclose(found.error, expected.error, atol=1e-4, rtol=1e-2)


def test_cuda_backend_with_the_kernels_references(model: Path, expected: Totals) -> None:
    calibrating = calibrator(model, "cpu")
    engine = calibrating.engine
    engine.backend = TritonBackend(engine.shape, engine.cache.pool.kv)
    assert_same(measure(calibrating), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_device(model: Path, expected: Totals) -> None:
    assert_same(measure(calibrator(model, "cuda")), expected)
