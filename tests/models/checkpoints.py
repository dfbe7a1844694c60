"""Tiny random checkpoints, saved by transformers, and the attention that tests run models with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tca_runtime.models.base import CausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def random_model(family: str, **settings: Any) -> PreTrainedModel:
    """A seeded model whose weights are all random: norms and biases too, so that all matter."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def save(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


class PlainAttention:
    """Causal attention over contiguous keys and values, kept from call to call.

    ``num_queries`` has one entry per call.
    """

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self.num_queries: list[int] = []

    def split(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Callable[[int, int], Tensor]:
        out = self(layer, q, k, v)
        return lambda begin, end: out[begin:end]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.num_queries.append(len(q))
        if layer in self._keys:
            k = torch.cat((self._keys[layer], k))
            v = torch.cat((self._values[layer], v))
        self._keys[layer], self._values[layer] = k, v
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


@torch.inference_mode()
def logits_of(model: CausalLM, ids: Tensor, chunks: list[int]) -> Tensor:
    """Logits of all positions, computed in chunks of the given sizes."""
    attention = PlainAttention()
    hidden = [
        model.forward(tokens, positions, attention)
        for tokens, positions in zip(
            ids.split(chunks), torch.arange(len(ids)).split(chunks), strict=True
        )
    ]
    return model.logits(torch.cat(hidden))


def random_ids(count: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (count,), generator=torch.Generator().manual_seed(7))
