"""GGUF files made from transformers models the way llama.cpp's converter makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, quants
from transformers import PreTrainedModel

Array = npt.NDArray[Any]


def write_gguf(
    model: PreTrainedModel, path: Path, kind: GGMLQuantizationType, **extra_tensors: Array
) -> None:
    """Write ``model`` with its matrices stored as ``kind``."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}.get(
            config.model_type, gguf.MODEL_ARCH.QWEN3
        ),
        config.num_hidden_layers,
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if config.model_type == "llama":
            values = _interleave(name, values, model)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 1:
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, quants.quantize(values, kind), raw_dtype=kind)
    for stored, values in extra_tensors.items():
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise_in_place(model: PreTrainedModel, kind: GGMLQuantizationType) -> None:
    """Replace the matrices by what storing them as ``kind`` leaves of them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                stored = quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(quants.dequantize(stored, kind).copy()))


def _interleave(name: str, values: Array, model: PreTrainedModel) -> Array:
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }
    count = next((n for part, n in heads.items() if part in name), None)
    if count is None:
        return values
    halves = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
