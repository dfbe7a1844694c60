"""The same model code on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tca_runtime.config import ModelArgs
from tca_runtime.models.loader import load_model
from tests.models.checkpoints import PlainAttention, logits_of, random_ids, random_model, save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@torch.inference_mode()
def cuda_logits(args: ModelArgs, ids: torch.Tensor) -> torch.Tensor:
    loaded = load_model(args)
    assert loaded.device.type == "cuda"
    positions = torch.arange(len(ids), device="cuda")
    hidden = loaded.model.forward(ids.cuda(), positions, PlainAttention())
    assert hidden.dtype == loaded.dtype
    return loaded.model.logits(hidden).cpu()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("dtype", "relative"), [("float32", 1e-3), ("float16", 0.01), ("bfloat16", 0.05)]
)
def test_gpu_equals_cpu(family: str, dtype: str, relative: float, tmp_path: Path) -> None:
    path = str(save(random_model(family), tmp_path))
    ids = random_ids(100)
    expected = logits_of(load_model(ModelArgs(model_path=path, device="cpu")).model, ids, [100])
    actual = cuda_logits(ModelArgs(model_path=path, device="cuda", dtype=dtype), ids)
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() < relative * expected.abs().max()


def test_dummy_weights_default_to_bfloat16() -> None:
    args = ModelArgs(load_format="dummy", model_config="tiny")
    assert load_model(args).dtype == torch.bfloat16
    assert cuda_logits(args, random_ids(20)).isfinite().all()
