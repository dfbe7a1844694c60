"""Llama 2 and 3, SmolLM2, and everything else that is saved as Llama: the plain decoder."""

from __future__ import annotations

from tca_runtime.models.architecture import Architecture

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    gguf_name="llama",
    qkv_bias=None,
    gguf_interleaved=True,
)
