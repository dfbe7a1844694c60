"""Which attention backend serves a model: the first candidate that accepts its shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from tca_runtime.attention.base import AttentionBackend, AttentionShape


class Candidate(Protocol):
    """The class of a backend."""

    def unsupported(self, shape: AttentionShape) -> str | None:
        """Why the backend cannot serve ``shape``, or None."""
        ...

    def __call__(self, shape: AttentionShape, kv: Tensor) -> AttentionBackend: ...


def _cpu() -> Candidate:
    from tca_runtime.attention.cpu_backend import CpuBackend

    return CpuBackend


def _flashinfer() -> Candidate:
    from tca_runtime.attention.flashinfer_backend import FlashInferBackend

    return FlashInferBackend


def _triton() -> Candidate:
    from tca_runtime.attention.triton_backend import TritonBackend

    return TritonBackend


def _torch() -> Candidate:
    from tca_runtime.attention.torch_backend import TorchBackend

    return TorchBackend


# Fastest first; the reference accepts everything, so it comes last. Loaded when their turn comes,
# because their dependencies are heavy or optional.
_CANDIDATES: dict[str, Callable[[], Candidate]] = {
    "flashinfer": _flashinfer,
    "triton": _triton,
    "cpu": _cpu,
    "torch": _torch,
}


def create_backend(name: str, shape: AttentionShape, kv: Tensor) -> AttentionBackend:
    """Create the backend called ``name``; ``auto`` takes the fastest that accepts ``shape``.

    Raises
    ------
    ValueError
        If no backend has that name, or none may serve ``shape``; the message says why.
    """
    if name != "auto" and name not in _CANDIDATES:
        known = ", ".join(["auto", *_CANDIDATES])
        raise ValueError(f"unknown attention backend {name!r}; known are {known}")
    refusals: list[str] = []
    for candidate in _CANDIDATES if name == "auto" else [name]:
        try:
            backend = _CANDIDATES[candidate]()
        except ImportError as error:
            refusals.append(f"{candidate} cannot be imported: {error}")
            continue
        refusal = backend.unsupported(shape)
        if refusal is None:
            return backend(shape, kv)
        refusals.append(f"{candidate} {refusal}")
    raise ValueError(f"no attention backend accepts {shape}: {'; '.join(refusals)}")
