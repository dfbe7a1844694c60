"""Mistral: Llama without biases, with a sliding window in its first version."""

from __future__ import annotations

from tca_runtime.models.architecture import Architecture

# Its GGUF files call themselves "llama".
MISTRAL = Architecture(name="MistralForCausalLM", model_type="mistral", gguf_name=None)
