"""A ``ModelConfig`` from the metadata of a GGUF file."""

from __future__ import annotations

from typing import Any

from tca_runtime.gguf_file import GgufFile
from tca_runtime.models.config import ModelConfig, RopeConfig
from tca_runtime.models.errors import ModelError
from tca_runtime.models.hf_config import yarn_attention_factor
from tca_runtime.models.registry import find_gguf_architecture

_CONTROL = 3
# Control tokens that end a turn whatever the file's own eos id says; converters record only one.
_END_TOKENS = {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"}
ROPE_DIVISORS = "rope_freqs.weight"


def config_from_gguf(file: GgufFile, rope_divisors: tuple[float, ...]) -> ModelConfig:
    """Translate the metadata; ``rope_divisors`` is the content of the ``rope_freqs`` tensor.

    Raises
    ------
    ModelError
        If a key is missing, or the architecture or a setting of it is not supported.
    """
    try:
        return _build(file, rope_divisors)
    except KeyError as error:
        raise ModelError(f"{file.path}: metadata key {error} is missing") from error


def _build(file: GgufFile, rope_divisors: tuple[float, ...]) -> ModelConfig:
    where = str(file.path)
    prefix = file.metadata["general.architecture"]
    architecture = find_gguf_architecture(prefix, where)
    meta = {
        key.removeprefix(f"{prefix}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{prefix}.")
    }
    num_q_heads = int(meta["attention.head_count"])
    hidden_size = int(meta["embedding_length"])
    head_dim = int(meta.get("attention.key_length", hidden_size // num_q_heads))
    if int(meta.get("rope.dimension_count", head_dim)) != head_dim:
        raise ModelError(f"{where}: rotary encoding of a part of each head is not supported")
    if meta.get("expert_count"):
        raise ModelError(f"{where}: mixtures of experts are not supported")
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{where}: tensor 'token_embd.weight' is missing")
    return ModelConfig(
        architecture=architecture.name,
        model_type=architecture.model_type,
        num_layers=int(meta["block_count"]),
        hidden_size=hidden_size,
        num_q_heads=num_q_heads,
        num_kv_heads=int(meta.get("attention.head_count_kv", num_q_heads)),
        head_dim=head_dim,
        intermediate_size=int(meta["feed_forward_length"]),
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        rms_eps=float(meta["attention.layer_norm_rms_epsilon"]),
        rope=_rope(meta, rope_divisors, where),
        max_position=int(meta["context_length"]),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm=architecture.qk_norm,
        sliding_window=meta.get("attention.sliding_window"),
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=_eos_token_ids(file.metadata),
    )


def _rope(meta: dict[str, Any], divisors: tuple[float, ...], where: str) -> RopeConfig:
    theta = float(meta.get("rope.freq_base", 10000.0))
    kind = meta.get("rope.scaling.type", "none")
    if kind == "none":
        return RopeConfig(theta, freq_divisors=divisors)
    factor = float(meta["rope.scaling.factor"])
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    if kind != "yarn":
        raise ModelError(f"{where}: rope.scaling.type {kind!r} is not supported")
    original = meta.get("rope.scaling.original_context_length", meta["context_length"])
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_position=int(original),
        attention_factor=yarn_attention_factor(factor),
    )


def _eos_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [metadata[f"tokenizer.ggml.{k}"] for k in keys if f"tokenizer.ggml.{k}" in metadata]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = metadata.get("tokenizer.ggml.token_type", [])
    pairs = zip(tokens, types, strict=False)
    ids += [i for i, (t, kind) in enumerate(pairs) if kind == _CONTROL and t in _END_TOKENS]
    return tuple(dict.fromkeys(ids))
