"""A ``ModelConfig`` from a Hugging Face directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from tca_runtime.models.config import ModelConfig, RopeConfig
from tca_runtime.models.errors import ModelError
from tca_runtime.models.registry import find_architecture

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def config_from_directory(directory: Path) -> ModelConfig:
    """Read ``config.json`` and, for the end-of-sequence ids, ``generation_config.json``.

    Raises
    ------
    ModelError
        If a file is missing or broken, or asks for something that is not supported.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory}: expected a config.json there, found none")
    hf = _read_json(path)
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    try:
        config = _build(hf, generation, str(path))
    except ModelError:
        raise
    except KeyError as error:
        raise ModelError(f"{path}: field {error} is missing") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{path}: a field has a value of the wrong kind ({error})") from error
    _check_sizes(config, str(path))
    return config


def _build(hf: dict[str, Any], generation: dict[str, Any], where: str) -> ModelConfig:
    architecture = find_architecture((hf.get("architectures") or ["(none)"])[0], where)
    _refuse_unsupported(hf, where)
    attention_bias = bool(hf.get("attention_bias", False))
    num_q_heads = int(hf["num_attention_heads"])
    eos = generation.get("eos_token_id")
    return ModelConfig(
        architecture=architecture.name,
        model_type=architecture.model_type,
        num_layers=int(hf["num_hidden_layers"]),
        hidden_size=int(hf["hidden_size"]),
        num_q_heads=num_q_heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or num_q_heads),
        head_dim=int(hf.get("head_dim") or hf["hidden_size"] // num_q_heads),
        intermediate_size=int(hf["intermediate_size"]),
        vocab_size=int(hf["vocab_size"]),
        rms_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope=_rope(hf, where),
        max_position=int(hf["max_position_embeddings"]),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if architecture.qkv_bias is None else architecture.qkv_bias,
        o_bias=attention_bias if architecture.qkv_bias is None else False,
        qk_norm=architecture.qk_norm,
        sliding_window=_sliding_window(hf),
        bos_token_id=_first(hf.get("bos_token_id")),
        eos_token_ids=_as_tuple(hf.get("eos_token_id") if eos is None else eos),
        dtype=_dtype(hf, where),
    )


def _check_sizes(config: ModelConfig, where: str) -> None:
    for name in (
        "num_layers",
        "hidden_size",
        "num_q_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position",
    ):
        if getattr(config, name) < 1:
            raise ModelError(f"{where}: {name} is {getattr(config, name)}, expected at least 1")
    if config.num_q_heads % config.num_kv_heads or config.head_dim % 2:
        raise ModelError(
            f"{where}: {config.num_q_heads} query heads over {config.num_kv_heads} KV heads of "
            f"size {config.head_dim} do not fit together"
        )
    if not all(isinstance(token, int) for token in config.eos_token_ids):
        raise ModelError(f"{where}: eos_token_id is {config.eos_token_ids}, expected token ids")


def _dtype(hf: dict[str, Any], where: str) -> torch.dtype | None:
    name = hf.get("dtype") or hf.get("torch_dtype")
    if name is None:
        return None
    if name not in _DTYPES:
        raise ModelError(
            f"{where}: dtype {name!r} is not supported; supported are: {', '.join(_DTYPES)}"
        )
    return _DTYPES[name]


def _refuse_unsupported(hf: dict[str, Any], where: str) -> None:
    if "quantization_config" in hf:
        method = hf["quantization_config"].get("quant_method", "quantised")
        raise ModelError(f"{where}: {method} weights are not supported; use safetensors or GGUF")
    if hf.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{where}: hidden_act {hf['hidden_act']!r} is not supported, only 'silu'")
    if hf.get("mlp_bias"):
        raise ModelError(f"{where}: mlp_bias is not supported")


def _sliding_window(hf: dict[str, Any]) -> int | None:
    # Qwen configs carry a window that `use_sliding_window` turns off.
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    return int(window) if window else None


def _rope(hf: dict[str, Any], where: str) -> RopeConfig:
    # transformers 5 writes rope_parameters, 4 wrote rope_theta beside rope_scaling.
    spec = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(spec.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = spec.get("rope_type") or spec.get("type") or "default"
    if kind == "default":
        rope = RopeConfig(theta)
    elif kind == "linear":
        rope = RopeConfig(theta, "linear", float(spec["factor"]))
    elif kind == "llama3":
        rope = RopeConfig(
            theta,
            "llama3",
            float(spec["factor"]),
            original_max_position=_original_max_position(hf, spec),
            low_freq_factor=float(spec["low_freq_factor"]),
            high_freq_factor=float(spec["high_freq_factor"]),
        )
    elif kind == "yarn":
        rope = _yarn(hf, spec, theta)
    else:
        raise ModelError(
            f"{where}: RoPE type {kind!r} is not supported; supported are: default, linear, "
            "llama3, yarn"
        )
    if spec.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"{where}: partial_rotary_factor is not supported")
    return rope


def _original_max_position(hf: dict[str, Any], spec: dict[str, Any]) -> int:
    return int(
        hf.get("original_max_position_embeddings")
        or spec.get("original_max_position_embeddings")
        or hf["max_position_embeddings"]
    )


def _yarn(hf: dict[str, Any], spec: dict[str, Any], theta: float) -> RopeConfig:
    original = _original_max_position(hf, spec)
    factor = float(spec.get("factor") or hf["max_position_embeddings"] / original)
    attention_factor = spec.get("attention_factor")
    if attention_factor is None:
        attention_factor = yarn_attention_factor(
            factor, spec.get("mscale") or 0.0, spec.get("mscale_all_dim") or 0.0
        )
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_position=original,
        beta_fast=float(spec.get("beta_fast") or 32),
        beta_slow=float(spec.get("beta_slow") or 1),
        attention_factor=float(attention_factor),
        truncate=bool(spec.get("truncate", True)),
    )


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """YaRN's scale of cos and sin for a stretch by ``factor`` (arXiv 2309.00071, eq. 22)."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return content


def _as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _first(ids: int | list[int] | None) -> int | None:
    return next(iter(_as_tuple(ids)), None)
