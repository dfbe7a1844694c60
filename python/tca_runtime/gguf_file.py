"""The header of a GGUF file: its metadata, and where each tensor's bytes lie.

The reader of the ``gguf`` package builds an array object per metadata element, which takes
seconds for a vocabulary; this one decodes the header in a single pass.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# GGUF value type -> struct and numpy code of the little-endian scalar
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


class GgufError(ValueError):
    """A GGUF file cannot be read; the message names the file."""


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. ``shape`` is row-major, outermost dimension first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


class GgufFile:
    """A GGUF file whose header has been read; tensor bytes are mapped, not loaded.

    Attributes
    ----------
    path : the file
    metadata : key -> number, string, bool, or list of these
    tensors : name -> place

    Raises
    ------
    GgufError
        If the file is not GGUF version 2 or 3, or ends before its last tensor does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise GgufError(f"{path}: the file is empty") from error
        cursor = _Cursor(self._map)
        try:
            self._read_header(cursor)
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise GgufError(f"{path}: the GGUF header is truncated or corrupt ({error})") from error

    def _read_header(self, cursor: _Cursor) -> None:
        if self._map[:4] != _MAGIC:
            raise GgufError(f"{self.path}: not a GGUF file (it starts with {self._map[:4]!r})")
        cursor.at = 4
        version = cursor.scalar("<I")
        if version not in _VERSIONS:
            raise GgufError(f"{self.path}: GGUF version {version} is not one of {_VERSIONS}")
        num_tensors, num_pairs = cursor.scalar("<Q"), cursor.scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        infos = [self._read_tensor_info(cursor) for _ in range(num_tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        start = -(-cursor.at // alignment) * alignment
        self.tensors = {info.name: self._place(info, start) for info in infos}

    def _read_tensor_info(self, cursor: _Cursor) -> GgufTensor:
        name = cursor.string()
        # GGUF lists the innermost dimension first.
        shape = tuple(cursor.scalar("<Q") for _ in range(cursor.scalar("<I")))[::-1]
        code = cursor.scalar("<I")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError as error:
            raise GgufError(f"{self.path}: tensor {name!r} has unknown type {code}") from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(shape) // block * block_bytes
        return GgufTensor(name, shape, kind, cursor.scalar("<Q"), num_bytes)

    def _place(self, info: GgufTensor, start: int) -> GgufTensor:
        offset = start + info.offset
        if offset + info.num_bytes > len(self._map):
            raise GgufError(
                f"{self.path}: tensor {info.name!r} should end at byte {offset + info.num_bytes}, "
                f"but the file has {len(self._map)}: it is truncated"
            )
        return GgufTensor(info.name, info.shape, info.type, offset, info.num_bytes)

    def raw(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """Stored bytes of a tensor, ``[..., bytes per row]``, backed by the file."""
        data = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)
        return data.reshape(*tensor.shape[:-1], -1)


class _Cursor:
    """Reads GGUF values one after another."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.buffer, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        start = self.at
        self.at += length
        data = self.buffer[start : self.at]
        if len(data) != length:
            raise struct.error("a string runs past the end of the file")
        return data.decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            start = self.at
            self.at += struct.calcsize(code) * count
            data = self.buffer[start : self.at]
            return [item for (item,) in struct.iter_unpack(code, data)]
        return [self.value(kind) for _ in range(count)]
