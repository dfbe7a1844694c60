"""Qwen2 and Qwen2.5: biases on query, key and value."""

from __future__ import annotations

from tca_runtime.models.architecture import Architecture

QWEN2 = Architecture(name="Qwen2ForCausalLM", model_type="qwen2", gguf_name="qwen2", qkv_bias=True)
