"""Supported model families, by Hugging Face's and by GGUF's name."""

from __future__ import annotations

from tca_runtime.models.architecture import Architecture
from tca_runtime.models.errors import ModelError
from tca_runtime.models.llama import LLAMA
from tca_runtime.models.mistral import MISTRAL
from tca_runtime.models.qwen2 import QWEN2
from tca_runtime.models.qwen3 import QWEN3

ARCHITECTURES = (LLAMA, QWEN2, QWEN3, MISTRAL)


def find_architecture(name: str, where: str) -> Architecture:
    """The family that ``config.json`` calls ``name``; ``where`` is named in the error."""
    return _find({a.name: a for a in ARCHITECTURES}, name, where)


def find_gguf_architecture(name: str, where: str) -> Architecture:
    """The family that a GGUF file calls ``name``; ``where`` is named in the error."""
    return _find({a.gguf_name: a for a in ARCHITECTURES if a.gguf_name}, name, where)


def _find(table: dict[str, Architecture], name: str, where: str) -> Architecture:
    try:
        return table[name]
    except KeyError:
        supported = ", ".join(table)
        raise ModelError(
            f"{where}: architecture {name!r} is not supported; supported are: {supported}"
        ) from None
