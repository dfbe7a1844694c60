"""How a model family departs from the plain decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One supported family.

    Attributes
    ----------
    name : Hugging Face's class name in ``config.json``
    model_type : Hugging Face's short name
    gguf_name : ``general.architecture`` of its GGUF files, None if it has no name of its own
    qkv_bias : biases on the query, key and value projections; None if ``attention_bias`` of
        ``config.json`` decides, which then covers the output projection too
    qk_norm : RMS norm of each query and key head before RoPE
    gguf_interleaved : whether its GGUF files hold the rows of each query and key head in the
        order of interleaved RoPE pairs
    """

    name: str
    model_type: str
    gguf_name: str | None
    qkv_bias: bool | None = False
    qk_norm: bool = False
    gguf_interleaved: bool = False
