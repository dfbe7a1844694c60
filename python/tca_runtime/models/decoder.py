"""The decoder that all supported families share; ``ModelConfig`` says what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from tca_runtime.attention.base import LayerAttention, SplitAttention
from tca_runtime.models.config import ModelConfig
from tca_runtime.models.layers import (
    DecoderLayer,
    Embedding,
    GatedMLP,
    HeadNorm,
    RMSNorm,
    SelfAttention,
)
from tca_runtime.models.rope import RotaryTable
from tca_runtime.models.weights.builder import WeightBuilder


class DecoderPass:
    """A forward pass of a ``Decoder``, part by part (``ForwardPass``)."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: LayerAttention,
        part_tokens: int | None = None,
        wanted: Tensor | None = None,
    ) -> None:
        self._norm = norm
        self._hidden = hidden
        # It must not know this object: a cycle would keep what attention holds alive for long.
        self._parts: Iterator[Tensor] = _parts(
            layers, hidden, rotation, attention, part_tokens, wanted
        )
        self._read = wanted if part_tokens is not None else None
        # Where a layer is more than one part, its projections and its selection are parts too.
        per_layer = 2 - (-len(hidden) // part_tokens) if part_tokens else 1
        last = 1 if _unread(wanted) else per_layer
        self._num_left = (len(layers) - 1) * per_layer + last

    def advance(self, num_parts: int) -> None:
        """See ``ForwardPass``."""
        for _ in range(min(num_parts, self._num_left)):
            self._hidden = next(self._parts)
            self._num_left -= 1
        if not self._num_left:
            self._parts = iter(())

    @property
    def parts_left(self) -> int:
        """See ``ForwardPass``."""
        return self._num_left

    def hidden(self) -> Tensor:
        """See ``ForwardPass``."""
        assert not self._num_left
        hidden = self._hidden
        if self._read is not None:
            hidden = hidden[self._read]
        return self._norm(hidden) if len(hidden) else hidden


def _parts(
    layers: Sequence[DecoderLayer],
    hidden: Tensor,
    rotation: tuple[Tensor, Tensor],
    attention: LayerAttention,
    part_tokens: int | None,
    wanted: Tensor | None,
) -> Iterator[Tensor]:
    """Computes a part, then pauses with the hidden states as they are by then."""
    for index, layer in enumerate(layers):
        q, k, v = layer.attention.heads(layer.input_norm(hidden), *rotation)
        is_last = index == len(layers) - 1
        if is_last and _unread(wanted):
            attention(index, q[:0], k, v)
            yield hidden[:0]
            continue
        if part_tokens is None:
            attended = attention(index, q, k, v)
            if wanted is not None and is_last:
                hidden, attended = hidden[wanted], attended[wanted]
            _add(layer, hidden, attended)
            yield hidden
            continue
        yield hidden
        attend = cast("SplitAttention", attention).split(index, q, k, v)
        yield hidden
        for begin in range(0, len(q), part_tokens):
            end = min(begin + part_tokens, len(q))
            _add(layer, hidden[begin:end], attend(begin, end))
            yield hidden


def _unread(wanted: Tensor | None) -> bool:
    """Whether nobody reads the last layer's output."""
    return wanted is not None and not len(wanted)


def _add(layer: DecoderLayer, hidden: Tensor, attended: Tensor) -> None:
    """What a layer does behind its attention, in place."""
    layer.attention.output.add_to(hidden, attended)
    layer.mlp.add_to(hidden, layer.mlp_norm(hidden))


class Decoder:
    """A pre-norm decoder with RMS norm, rotary positions and gated MLPs (``CausalLM``)."""

    def __init__(self, config: ModelConfig, weights: WeightBuilder) -> None:
        self._head = weights.linear(
            ["model.embed_tokens" if config.tie_embeddings else "lm_head"],
            [config.vocab_size],
            config.hidden_size,
        )
        if config.tie_embeddings:
            self._embedding = Embedding(self._head.weight)
        else:
            self._embedding = weights.embedding(
                "model.embed_tokens", config.vocab_size, config.hidden_size
            )
        self._layers = [_layer(config, weights, index) for index in range(config.num_layers)]
        self._norm = RMSNorm(
            weights.vector(["model.norm.weight"], [config.hidden_size]), config.rms_eps
        )
        self._rotary = RotaryTable(
            config.rope, config.head_dim, config.max_position, weights.dtype, weights.device
        )

    def begin(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        part_tokens: int | None = None,
        wanted: Tensor | None = None,
    ) -> DecoderPass:
        """See ``CausalLM.begin``."""
        hidden, rotation = self._embedding(input_ids), self._rotary.lookup(positions)
        return DecoderPass(
            self._layers, self._norm, hidden, rotation, attention, part_tokens, wanted
        )

    def forward(self, input_ids: Tensor, positions: Tensor, attention: LayerAttention) -> Tensor:
        """Hidden states ``[T, hidden]`` after the final norm; see ``CausalLM.forward``."""
        whole = self.begin(input_ids, positions, attention)
        whole.advance(len(self._layers))
        return whole.hidden()

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``[N, vocab]`` of ``[N, hidden]``."""
        return self._head(hidden).to(torch.float32)

    def output_projection(self, layer: int) -> Tensor:
        """Takes a layer's attention to the residual stream: ``[Hq * D, hidden]``."""
        return self._layers[layer].attention.output.weight.t()

    def fingerprint(self) -> str:
        """Names the weights, whatever dtype and device they are loaded to."""
        sample = torch.cat([self._embedding.table[:64].flatten(), self._norm.weight])
        rounded = sample.to("cpu", torch.bfloat16).view(torch.int16)
        return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()[:16]


def _layer(config: ModelConfig, weights: WeightBuilder, index: int) -> DecoderLayer:
    prefix = f"model.layers.{index}"

    def norm(name: str) -> RMSNorm:
        weight = weights.vector([f"{prefix}.{name}.weight"], [config.hidden_size])
        return RMSNorm(weight, config.rms_eps)

    mlp = GatedMLP(
        weights.linear(
            [f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"],
            [config.intermediate_size] * 2,
            config.hidden_size,
        ),
        weights.linear([f"{prefix}.mlp.down_proj"], [config.hidden_size], config.intermediate_size),
    )
    return DecoderLayer(
        norm("input_layernorm"),
        _attention(config, weights, f"{prefix}.self_attn"),
        norm("post_attention_layernorm"),
        mlp,
    )


def _attention(config: ModelConfig, weights: WeightBuilder, prefix: str) -> SelfAttention:
    q_size = config.num_q_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    head_norm = None
    if config.qk_norm:
        parts = weights.vector(
            [f"{prefix}.q_norm.weight", f"{prefix}.k_norm.weight"], [config.head_dim] * 2
        ).view(2, config.head_dim)
        counts = torch.tensor([config.num_q_heads, config.num_kv_heads], device=parts.device)
        head_norm = HeadNorm(parts.repeat_interleave(counts, dim=0), config.rms_eps)
    return SelfAttention(
        qkv=weights.linear(
            [f"{prefix}.{name}_proj" for name in "qkv"],
            [q_size, kv_size, kv_size],
            config.hidden_size,
            bias=config.qkv_bias,
        ),
        head_norm=head_norm,
        output=weights.linear(
            [f"{prefix}.o_proj"], [config.hidden_size], q_size, bias=config.o_bias
        ),
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
