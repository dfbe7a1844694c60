"""Tensors of a GGUF file, dequantised to float32 and put in Hugging Face's order."""

from __future__ import annotations

import numpy as np
import torch
from gguf import quants
from torch import Tensor

from tca_runtime.gguf_file import GgufFile, GgufTensor
from tca_runtime.models.architecture import Architecture
from tca_runtime.models.config import ModelConfig
from tca_runtime.models.errors import ModelError

_GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GgufSource:
    """Reads from a memory-mapped file."""

    def __init__(self, file: GgufFile, config: ModelConfig, architecture: Architecture) -> None:
        self._file = file
        self._interleaved_heads = (
            {"attn_q": config.num_q_heads, "attn_k": config.num_kv_heads}
            if architecture.gguf_interleaved
            else {}
        )

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored_name = gguf_name(name)
        info = self._file.tensors.get(stored_name)
        if info is None:
            raise ModelError(f"{self._file.path}: tensor {stored_name!r} is missing")
        if info.shape != shape:
            raise ModelError(
                f"{self._file.path}: tensor {stored_name!r} has shape {info.shape}, "
                f"expected {shape}"
            )
        tensor = dequantise(self._file, info)
        heads = self._interleaved_heads.get(stored_name.split(".")[-2])
        return tensor if heads is None else _split_pairs(tensor, heads)


def gguf_name(name: str) -> str:
    """GGUF's name of the tensor that Hugging Face calls ``name``."""
    stem, kind = name.rsplit(".", 1)
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"


def dequantise(file: GgufFile, info: GgufTensor) -> Tensor:
    """The tensor's values in float32.

    Raises
    ------
    ModelError
        If its quantisation type is not supported.
    """
    try:
        values = quants.dequantize(file.raw(info), info.type)
    except NotImplementedError as error:
        raise ModelError(
            f"{file.path}: tensor {info.name!r} is stored as {info.type.name}, "
            "which is not supported"
        ) from error
    # Unquantised tensors come back as views of the mapped file, which is read-only.
    return torch.from_numpy(np.array(values, dtype=np.float32, copy=not values.flags.writeable))


def _split_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from interleaved RoPE pairs to Hugging Face's two halves."""
    rows = tensor.shape[0]
    pairs = tensor.view(heads, rows // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
