"""Prefill through FlashInfer's ragged kernels (FA3 on Hopper, FA2 elsewhere), decode in Triton."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

# FlashInfer announces every kernel it builds.
os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "warning")

import flashinfer

from tca_runtime.attention.base import AttentionShape
from tca_runtime.attention.cuda_backend import CudaBackend, Lengths

WORKSPACE_BYTES = 256 << 20
# Beside one per layer: chunks that see all of their past share one.
SPARE_PLANS = 2
HEAD_DIMS = (64, 128, 256)


class FlashInferPrefill:
    """Ragged causal attention; sequence lengths come from the host, so planning waits for nothing.

    A plan's tables travel from pinned memory to the device while the host goes on. Each wrapper
    holds one plan, and is planned anew only after its last tables have arrived. Budgets differ by
    layer and so do plans: with a wrapper per layer the host can queue a whole step.
    """

    def __init__(self, shape: AttentionShape, backend: str = "auto") -> None:
        """``backend``: ``fa2``, ``fa3`` or ``auto``."""
        self._shape = shape
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
        self._wrappers = [
            flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend=backend)
            for _ in range(shape.num_layers + SPARE_PLANS)
        ]
        self._arrived = [torch.cuda.Event() for _ in self._wrappers]
        self._planned: list[tuple[bytes, bytes, int, int] | None] = [None] * len(self._wrappers)
        self._next = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, kv_lengths: Lengths
    ) -> Tensor:
        """See ``RaggedPrefill``."""
        key = (q_lengths.tobytes(), kv_lengths.tobytes(), q.shape[1], k.shape[1])
        if key not in self._planned:
            self._plan(key, q_lengths, kv_lengths)
        out: Tensor = self._wrappers[self._planned.index(key)].run(q, k, v)
        return out

    def _plan(
        self, key: tuple[bytes, bytes, int, int], q_lengths: Lengths, kv_lengths: Lengths
    ) -> None:
        place = self._next
        self._next = (place + 1) % len(self._wrappers)
        self._arrived[place].synchronize()
        self._wrappers[place].plan(
            _indptr(q_lengths),
            _indptr(kv_lengths),
            key[2],
            key[3],
            self._shape.head_dim,
            causal=True,
            sm_scale=self._shape.scale,
            q_data_type=self._shape.dtype,
            kv_data_type=self._shape.dtype,
        )
        self._arrived[place].record()
        self._planned[place] = key


class FlashInferBackend(CudaBackend):
    """The fastest on NVIDIA GPUs; half precision only."""

    def __init__(self, shape: AttentionShape, kv: Tensor, prefill: str = "auto") -> None:
        super().__init__(shape, kv, FlashInferPrefill(shape, prefill))

    @staticmethod
    def unsupported(shape: AttentionShape) -> str | None:
        """Why the backend cannot serve ``shape``, or None."""
        if shape.device.type != "cuda":
            return f"runs on cuda, not on {shape.device.type}"
        if shape.dtype not in (torch.float16, torch.bfloat16):
            return f"computes in float16 or bfloat16, not in {shape.dtype}"
        if shape.head_dim not in HEAD_DIMS:
            return f"has kernels for head sizes {HEAD_DIMS}, not for {shape.head_dim}"
        return None


def _indptr(lengths: Lengths) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
