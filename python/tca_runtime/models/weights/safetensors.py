"""Tensors of a Hugging Face directory, single-file or sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tca_runtime.models.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Others are quantised: without their scales the numbers mean nothing.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SafetensorsSource:
    """Reads from memory-mapped files, opened when first needed.

    Raises
    ------
    ModelError
        If the directory has no weights, or its index is broken or names a missing file.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open_files: dict[Path, Any] = {}
        if (directory / _INDEX).is_file():
            self._files = _read_index(directory / _INDEX)
        elif (directory / _SINGLE).is_file():
            path = directory / _SINGLE
            self._files = dict.fromkeys(self._handle(path).keys(), path)
        else:
            raise ModelError(f"{directory}: {_nothing_safe(directory)}")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        path = self._files.get(name)
        if path is None:
            raise ModelError(f"{self._directory}: tensor {name!r} is missing")
        try:
            tensor: Tensor = self._handle(path).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path}: tensor {name!r} cannot be read ({error})") from error
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        if tensor.dtype not in _DTYPES:
            raise ModelError(
                f"{path}: tensor {name!r} is stored as {str(tensor.dtype).removeprefix('torch.')}, "
                "which is not supported; use float32, bfloat16 or float16 weights"
            )
        return tensor

    def _handle(self, path: Path) -> Any:
        if path not in self._open_files:
            try:
                self._open_files[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
        return self._open_files[path]


def _nothing_safe(directory: Path) -> str:
    """Why there are no weights to read."""
    expected = f"expected {_SINGLE} or {_INDEX} there, found neither"
    pickled = [p.name for p in sorted(directory.iterdir()) if p.suffix in _PICKLED]
    if not pickled:
        return expected
    return (
        f"{pickled[0]} is a pickle, which can run any code when it is loaded, so it is refused; "
        "convert it to safetensors, for example with save_pretrained of transformers"
    )


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {name: path.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a valid safetensors index ({error!r})") from error
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise ModelError(f"{path}: names {file.name}, which is not in {path.parent}")
    return files
