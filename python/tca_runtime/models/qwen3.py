"""Qwen3 (dense): normalised query and key heads."""

from __future__ import annotations

from tca_runtime.models.architecture import Architecture

QWEN3 = Architecture(
    name="Qwen3ForCausalLM", model_type="qwen3", gguf_name="qwen3", qkv_bias=None, qk_norm=True
)
