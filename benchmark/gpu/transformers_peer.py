"""Hugging Face transformers with continuous batching, on the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tca_runtime.config import ModelArgs
from tca_runtime.models.config import ModelConfig, named_config
from tca_runtime.models.loader import open_checkpoint
from tca_runtime.models.weights.source import WeightSource


def transformers_config(config: ModelConfig) -> AutoConfig:
    """The same model in transformers' words.

    Raises
    ------
    ValueError
        For a stretched RoPE, which this benchmark has no need of.
    """
    if config.rope.type not in ("default", "llama3"):
        raise ValueError(f"RoPE {config.rope.type} is not translated")
    return AutoConfig.for_model(
        config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_q_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_eps,
        max_position_embeddings=config.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=None,
    )


class TransformersPeer:
    """``generate_batch`` over the prompts of a round; says nothing about single tokens."""

    def __init__(self, args: ModelArgs) -> None:
        source: WeightSource | None = None
        if args.model_config is not None:
            config = named_config(args.model_config)
        else:
            config, source = open_checkpoint(Path(args.model_path))
        dtype = getattr(torch, args.dtype)
        with torch.device(args.device):
            self._model = AutoModelForCausalLM.from_config(
                transformers_config(config), dtype=dtype, attn_implementation="sdpa"
            ).eval()
        if source is not None:
            with torch.no_grad():
                for name, parameter in self._model.named_parameters():
                    parameter.copy_(source.read(name, tuple(parameter.shape)))

    def generate(
        self, prompts: list[list[int]], new_tokens: int
    ) -> tuple[list[list[int]], list[float]]:
        wanted = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        results = self._model.generate_batch(inputs=prompts, generation_config=wanted)
        # Requests are numbered in the order they were given.
        replies = sorted(results.values(), key=lambda r: int(r.request_id.rsplit("_", 1)[-1]))
        return [list(reply.generated_tokens) for reply in replies], []
