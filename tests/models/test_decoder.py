"""Every supported family and RoPE type gives transformers' logits."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tca_runtime.config import ModelArgs
from tca_runtime.models.loader import load_model
from tests.models.checkpoints import PlainAttention, logits_of, random_ids, random_model, save

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    ),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-rope-mscale": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    ),
    "llama-yarn-rope-betas": (
        "llama",
        {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2, "attention_factor": 1.5}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    reference = random_model(family, **settings)
    loaded = load_model(ModelArgs(model_path=str(save(reference, tmp_path)), device="cpu"))
    ids = random_ids(150)
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    assert expected.std() > 0.1
    # A long chunk, a short one and single tokens take different paths through the linear layers.
    actual = logits_of(loaded.model, ids, [100, 46, 3, 1])
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() < 1e-4


def test_sharded_equals_single_file(tmp_path: Path) -> None:
    reference = random_model("qwen2")
    save(reference, tmp_path / "single")
    save(reference, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    ids = random_ids(20)
    single, sharded = (
        logits_of(load_model(ModelArgs(model_path=str(tmp_path / name))).model, ids, [20])
        for name in ("single", "sharded")
    )
    assert torch.equal(single, sharded)


@pytest.mark.parametrize("num_parts", [1, 100])
def test_a_pass_leaves_nothing_for_the_garbage_collector(tmp_path: Path, num_parts: int) -> None:
    """What attention holds of a long prompt would fill a device before the collector runs."""

    class Attention:
        def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return q.flatten(1)

    args = ModelArgs(model_path=str(save(random_model("llama"), tmp_path)), device="cpu")
    model = load_model(args).model
    attention = Attention()
    held = weakref.ref(attention)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            made = model.begin(random_ids(8), torch.arange(8), attention)
            made.advance(num_parts)
        del attention
        assert (held() is None) == (made.parts_left == 0)
        del made
        assert held() is None
    finally:
        gc.enable()


def test_fingerprint_depends_on_the_weights(tmp_path: Path) -> None:
    reference = random_model("llama")
    args = ModelArgs(model_path=str(save(reference, tmp_path)), device="cpu")
    before = load_model(args).model.fingerprint()
    assert load_model(args).model.fingerprint() == before
    with torch.no_grad():
        reference.model.norm.weight[0] += 1.0
    save(reference, tmp_path)
    assert load_model(args).model.fingerprint() != before


@torch.inference_mode()
@pytest.mark.parametrize("wanted", [[], [4], [0, 7, 8]])
def test_states_of_some_tokens_are_those_of_all(tmp_path: Path, wanted: list[int]) -> None:
    path = save(random_model("llama"), tmp_path)
    model = load_model(ModelArgs(model_path=str(path), device="cpu", dtype="float32")).model
    ids = random_ids(9)
    positions, places = torch.arange(9), torch.tensor(wanted, dtype=torch.int64)
    whole = model.forward(ids, positions, PlainAttention())
    some = model.begin(ids, positions, PlainAttention(), wanted=places)
    some.advance(some.parts_left)
    torch.testing.assert_close(some.hidden(), whole[places])


@torch.inference_mode()
@pytest.mark.parametrize("part_tokens", [None, 4])
def test_the_last_layer_only_stores_where_no_state_is_wanted(
    tmp_path: Path, part_tokens: int | None
) -> None:
    path = save(random_model("llama"), tmp_path)
    model = load_model(ModelArgs(model_path=str(path), device="cpu", dtype="float32")).model
    ids, positions = random_ids(14), torch.arange(14)
    whole = model.forward(ids, positions, PlainAttention())
    attention = PlainAttention()
    nothing = torch.tensor([], dtype=torch.int64)
    chunk = model.begin(ids[:9], positions[:9], attention, part_tokens, wanted=nothing)
    chunk.advance(chunk.parts_left)
    assert len(chunk.hidden()) == 0
    assert attention.num_queries == [9, 9, 0]
    torch.testing.assert_close(model.forward(ids[9:], positions[9:], attention), whole[9:])
