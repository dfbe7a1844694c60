"""What a decoder is made of: sizes, position encoding, special ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tca_runtime.models.errors import ModelError

RopeType = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position encoding.

    Attributes
    ----------
    theta : base of the frequencies
    type : how they are stretched beyond the original context
    factor : stretch (all but ``default``)
    original_max_position : context the stretch starts from (``llama3``, ``yarn``)
    low_freq_factor, high_freq_factor : ``llama3``
    beta_fast, beta_slow, attention_factor, truncate : ``yarn``; ``attention_factor`` scales
        cos and sin
    freq_divisors : if given, ``head_dim / 2`` numbers the frequencies are divided by, instead of
        a rule (GGUF files store the result of ``llama3`` so)
    """

    theta: float
    type: RopeType = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    freq_divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Everything the runtime knows about a model before its weights are read.

    Attributes
    ----------
    architecture : Hugging Face's class name, e.g. ``LlamaForCausalLM``
    model_type : Hugging Face's short name, e.g. ``llama``
    qkv_bias, o_bias : whether these projections have biases
    qk_norm : whether each query and key head is RMS-normalised before RoPE
    max_position : longest context
    sliding_window : tokens each layer attends to, None for all
    bos_token_id : None if the model has no such token
    eos_token_ids : any of these ends a generation
    dtype : dtype of the checkpoint, None if it does not say or is quantised
    """

    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_eps: float
    rope: RopeConfig
    max_position: int
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


NAMED_CONFIGS = {
    "llama-3.1-8b": ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_layers=32,
        hidden_size=4096,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        rms_eps=1e-5,
        rope=RopeConfig(theta=500000.0, type="llama3", factor=8.0, original_max_position=8192),
        max_position=131072,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    ),
    "qwen2.5-7b": ModelConfig(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        num_layers=28,
        hidden_size=3584,
        num_q_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        vocab_size=152064,
        rms_eps=1e-6,
        rope=RopeConfig(theta=1000000.0),
        max_position=131072,
        qkv_bias=True,
        bos_token_id=151643,
        eos_token_ids=(151645, 151643),
    ),
    # The vocabulary and special ids are those of the byte tokenizer that serves dummy models.
    "tiny": ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_layers=2,
        hidden_size=128,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=256,
        vocab_size=260,
        rms_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
        max_position=32768,
        tie_embeddings=True,
        bos_token_id=256,
        eos_token_ids=(258, 257),
    ),
}


def named_config(name: str) -> ModelConfig:
    """One of the shapes that ``--load-format dummy`` knows by name.

    Raises
    ------
    ModelError
        If there is none of that name.
    """
    try:
        return NAMED_CONFIGS[name]
    except KeyError:
        known = ", ".join(NAMED_CONFIGS)
        raise ModelError(f"--model-config {name!r} is not known; choose from: {known}") from None
