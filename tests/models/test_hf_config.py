"""What is read from config.json and generation_config.json, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tca_runtime.models.config import ModelConfig
from tca_runtime.models.errors import ModelError
from tca_runtime.models.hf_config import config_from_directory

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def read(directory: Path, generation: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return config_from_directory(directory)


def test_sizes_and_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.architecture, config.model_type) == ("LlamaForCausalLM", "llama")
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (4, 4, 16)
    assert config.dtype == torch.bfloat16
    assert not (config.tie_embeddings or config.qkv_bias or config.o_bias or config.qk_norm)
    assert read(tmp_path, num_key_value_heads=2, head_dim=32).head_dim == 32


def test_old_and_new_spelling_of_rope_and_dtype_agree(tmp_path: Path) -> None:
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **SCALING})
    new = read(
        tmp_path,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **SCALING},
        torch_dtype=None,
        dtype="bfloat16",
    )
    assert old == new
    assert (old.rope.type, old.rope.theta, old.rope.original_max_position) == ("llama3", 5e5, 128)
    legacy = read(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    assert (legacy.rope.type, legacy.rope.factor) == ("linear", 2.0)


def test_generation_config_decides_the_end_tokens(tmp_path: Path) -> None:
    assert read(tmp_path).eos_token_ids == (2,)
    assert read(tmp_path, eos_token_id=[2, 5]).eos_token_ids == (2, 5)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == ()
    assert read(tmp_path, {"eos_token_id": [0, 9]}).eos_token_ids == (0, 9)


def test_a_window_that_is_switched_off_is_none(tmp_path: Path) -> None:
    off = {"sliding_window": 128, "use_sliding_window": False}
    assert read(tmp_path, architectures=["Qwen2ForCausalLM"], **off).sliding_window is None
    mistral = read(tmp_path, architectures=["MistralForCausalLM"], sliding_window=128)
    assert mistral.sliding_window == 128


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*Llama.*Qwen2.*Qwen3.*Mistral"),
        ({"architectures": None}, "architecture"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope.*default, linear, llama3, yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_unsupported_settings_are_named(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read(tmp_path, **fields)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a config.json"):
        config_from_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelError, match=r"config\.json: not valid JSON"):
        config_from_directory(tmp_path)
    fields = {k: v for k, v in LLAMA.items() if k != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="field 'hidden_size' is missing"):
        config_from_directory(tmp_path)
