"""Prefill through FlashInfer's ragged kernels (FA3 on Hopper, FA2 elsewhere), decode in Triton."""

from __future__ import annotations

import logging
import os

import numpy as np
import torch
from torch import Tensor

# FlashInfer announces every kernel it builds.
os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "warning")

import flashinfer

from tca_runtime.attention import work_list
from tca_runtime.attention.base import AttentionShape
from tca_runtime.attention.cuda_backend import CudaBackend
from tca_runtime.attention.pieces import Lengths, Pieces, RaggedPrefill

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 256 << 20
# Beside one per layer: chunks that see all of their past share one.
SPARE_PLANS = 2
HEAD_DIMS = (64, 128, 256)


class FlashInferPrefill(RaggedPrefill):
    """Ragged causal attention; sequence lengths come from the host, so planning waits for nothing.

    A plan's tables travel from pinned memory to the device while the host goes on. Each wrapper
    holds one plan, and is planned anew only after its last tables have arrived. Budgets differ by
    layer and so do plans: with a wrapper per layer the host can queue a whole step.

    Where KV heads are sequences, FA3's list of work is pointed at the tokens in their usual layout,
    so that queries and results need not be copied (``work_list``).
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
        self._planned: list[tuple[object, ...] | None] = [None] * len(self._wrappers)
        self._next = 0
        self._in_place = backend != "fa2" and reads_in_place(self, shape)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, kv_lengths: Lengths
    ) -> Tensor:
        """See ``RaggedPrefill``."""
        key = (q_lengths.tobytes(), kv_lengths.tobytes(), q.shape[1], k.shape[1])
        if key not in self._planned:
            self._plan(key, q_lengths, kv_lengths, q.shape[1], k.shape[1])
        out: Tensor = self._wrappers[self._planned.index(key)].run(q, k, v)
        return out

    def attend_pieces(
        self, q: Tensor, keys: Tensor, values: Tensor, pieces: Pieces, lengths: Lengths, out: Tensor
    ) -> None:
        """See ``RaggedPrefill``."""
        if not (self._in_place and self.attend_in_place(q, keys, values, pieces, lengths, out)):
            super().attend_pieces(q, keys, values, pieces, lengths, out)

    def attend_in_place(
        self, q: Tensor, keys: Tensor, values: Tensor, pieces: Pieces, lengths: Lengths, out: Tensor
    ) -> bool:
        """``attend_pieces`` without copies; False, with nothing done, where FA3 cannot."""
        heads = lengths.shape[1]
        group = q.shape[1] // heads
        key = (pieces.starts.tobytes(), pieces.lengths.tobytes(), lengths.tobytes(), q.shape[:2])
        if key not in self._planned:
            q_lengths = pieces.lengths.repeat(heads)
            place = self._plan(key, q_lengths, lengths.reshape(-1), group, 1)
            wrapper = self._wrappers[place]
            if not work_list.point_at_tokens(wrapper, pieces.starts, heads, group, len(q)):
                self._planned[place] = None
                return False
            self._arrived[place].record()
        wrapper = self._wrappers[self._planned.index(key)]
        wrapper.run(q, *(work_list.by_head(x, heads) for x in (keys, values)), out=out)
        return True

    def _plan(
        self,
        key: tuple[object, ...],
        q_lengths: Lengths,
        kv_lengths: Lengths,
        num_q_heads: int,
        num_kv_heads: int,
    ) -> int:
        place = self._next
        self._next = (place + 1) % len(self._wrappers)
        self._arrived[place].synchronize()
        self._wrappers[place].plan(
            _indptr(q_lengths),
            _indptr(kv_lengths),
            num_q_heads,
            num_kv_heads,
            self._shape.head_dim,
            causal=True,
            sm_scale=self._shape.scale,
            q_data_type=self._shape.dtype,
            kv_data_type=self._shape.dtype,
        )
        self._arrived[place].record()
        self._planned[place] = key
        return place


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
    # Pinned: FlashInfer copies it to the device too, and from pageable memory that takes longer.
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).pin_memory()


def reads_in_place(prefill: FlashInferPrefill, shape: AttentionShape) -> bool:
    """Whether ``attend_in_place`` works with the FlashInfer that is installed.

    Its list of work is none of FlashInfer's promises, so the first thing done with it is a
    comparison with the promised way.
    """
    if torch.cuda.get_device_capability(shape.device)[0] != 9:
        return False
    pieces = Pieces.of([(1, 130), (140, 7)])
    heads = shape.num_kv_heads
    lengths = pieces.lengths[:, None] + np.arange(2 * heads).reshape(2, heads) * 3
    q, out, expected = torch.randn(
        3, 150, shape.num_q_heads, shape.head_dim, device=shape.device
    ).to(shape.dtype)
    keys, values = torch.randn(2, int(lengths.sum()), shape.head_dim, device=shape.device).to(
        shape.dtype
    )
    expected.copy_(out)
    try:
        done = prefill.attend_in_place(q, keys, values, pieces, lengths, out)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        logger.warning("FA3 copies queries and results with this FlashInfer: %s", error)
        return False
    RaggedPrefill.attend_pieces(prefill, q, keys, values, pieces, lengths, expected)
    same = done and torch.allclose(out, expected, atol=1e-2)
    if not same:
        logger.warning("FA3 copies queries and results with this FlashInfer")
    return same
