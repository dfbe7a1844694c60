"""Decode attention: one query per request over its slot lists."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tca_kernels import dispatch, reference
from tca_kernels.dispatch import check_lists, check_pool, next_power_of_2

_MERGE_BLOCK = 16


@dataclass(frozen=True)
class DecodeConfig:
    """How the split-KV kernel is cut.

    Attributes
    ----------
    tile : slots per step of a program
    num_warps, num_stages : Triton's, per program
    programs_per_sm : programs launched per multiprocessor; all should be resident at once
    """

    tile: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


# By bytes of one K row.
_CONFIGS = {
    32: DecodeConfig(128, 4, 3, 3),
    64: DecodeConfig(128, 4, 3, 3),
    128: DecodeConfig(128, 4, 3, 3),
    256: DecodeConfig(64, 2, 3, 3),
    512: DecodeConfig(32, 4, 3, 3),
    1024: DecodeConfig(16, 4, 3, 3),
}


def default_config(head_dim: int, dtype: torch.dtype) -> DecodeConfig:
    return _CONFIGS[head_dim * dtype.itemsize]


class DecodeWorkspace:
    """Device buffers of decode attention, and the map that splits the work by length.

    Made once. Every shape that a kernel sees depends on the batch size alone and every length is
    read on the device, so :meth:`plan` and :func:`decode_attention` can be captured in a CUDA
    graph; graphs of several batch sizes may share one workspace.
    """

    def __init__(
        self,
        max_batch: int,
        num_layers: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        config: DecodeConfig | None = None,
    ) -> None:
        """``dtype``: the pool's. ``config`` replaces the tuned default."""
        self.config = config or default_config(head_dim, dtype)
        self.num_kv_heads = num_kv_heads
        sms = (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else 1
        )
        self.num_programs = sms * self.config.programs_per_sm
        self.max_entries = max_batch * num_kv_heads
        group = num_q_heads // num_kv_heads
        rows = self.num_programs + self.max_entries
        self.partial = torch.empty(rows, group, head_dim, dtype=torch.float32, device=device)
        self.partial_lse = torch.empty(rows, group, dtype=torch.float32, device=device)
        self.lse = torch.empty(max_batch * num_q_heads, dtype=torch.float32, device=device)
        bounds_shape = (num_layers, self.max_entries + 1)
        self.bounds = torch.zeros(bounds_shape, dtype=torch.int32, device=device)
        first_shape = (num_layers, self.num_programs)
        self.first = torch.zeros(first_shape, dtype=torch.int32, device=device)
        self.planned_batch = 0

    def plan(self, length: Tensor) -> None:
        """Split the next decode step of all layers. One launch, no synchronisation.

        Parameters
        ----------
        length : int32 ``[B, L, Hkv]``, this step's token included
        """
        from tca_kernels.triton.decode import split_map_kernel

        batch, num_layers, num_heads = length.shape
        entries = batch * num_heads
        if entries > self.max_entries or num_layers > self.bounds.shape[0]:
            raise ValueError(
                f"lengths {tuple(length.shape)} exceed a workspace for {self.max_entries} "
                f"(request, head) pairs and {self.bounds.shape[0]} layers"
            )
        self.planned_batch = batch
        padded = next_power_of_2(entries)
        split_map_kernel[(num_layers,)](
            length,
            *length.stride(),
            self.bounds,
            self.bounds.stride(0),
            self.first,
            entries,
            num_heads,
            self.num_programs,
            ENTRIES=padded,
            PROGRAMS=next_power_of_2(self.num_programs),
            STEPS=padded.bit_length(),
            TILE=self.config.tile,
            num_warps=8,
        )


def decode_attention(
    q: Tensor,
    kv: Tensor,
    arena: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    *,
    workspace: DecodeWorkspace | None = None,
    layer: int = 0,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    r"""Attend with one query per request to the slots of its lists.

    ``out[b, h] = sum_j softmax_j(scale * q[b, h] . K_j) V_j`` over the slots ``j`` of list
    ``(b, h // G)``: the paper's attention over core context and local window. An empty list gives
    zeros.

    Parameters
    ----------
    q : ``[B, Hq, D]``; last dimension contiguous
    kv : ``[num_slots, 2, D]``, contiguous; float32, float16 or bfloat16
    arena : int32 ``[A]``; ``arena[start : start + length]`` is a list
    start : int64 ``[B, Hkv]``, any strides
    length : int32 ``[B, Hkv]``, any strides
    scale : usually ``D ** -0.5``
    workspace : planned for this step's lengths. Without one, buffers are made and the split is
        planned in this call. Not used on the CPU.
    layer : the layer of ``workspace``'s plan
    out : ``[B, Hq, D]`` to write to; like ``q`` and new if absent
    lse : float32 ``[B, Hq]``, contiguous; receives the natural log-sum-exp if given

    Returns
    -------
    ``out``.

    Raises
    ------
    ValueError
        On a pool whose layout the kernels do not cover, or a plan for another batch.
    """
    check_pool(kv, q.shape[-1])
    check_lists(arena=arena)
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if dispatch.use_triton(q):
        _decode_triton(q, kv, arena, start, length, scale, workspace, layer, out, lse)
    else:
        value, norm = reference.decode_attention(q, kv, arena, start, length, scale)
        out.copy_(value)
        if lse is not None:
            lse.copy_(norm)
    return out


def _decode_triton(
    q: Tensor,
    kv: Tensor,
    arena: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    workspace: DecodeWorkspace | None,
    layer: int,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    from tca_kernels.triton.decode import merge_partials_kernel, split_decode_kernel

    batch, num_q_heads, head_dim = q.shape
    num_heads = start.shape[1]
    group = num_q_heads // num_heads
    if workspace is None:
        workspace = DecodeWorkspace(batch, 1, num_q_heads, num_heads, head_dim, kv.dtype, q.device)
        workspace.plan(length[:, None])
    if workspace.planned_batch != batch:
        raise ValueError(f"batch of {batch}, but planned for {workspace.planned_batch}")
    entries = batch * num_heads
    bounds = workspace.bounds[layer]
    split_decode_kernel[(workspace.num_programs,)](
        q,
        q.stride(0),
        q.stride(1),
        kv,
        arena,
        start,
        *start.stride(),
        length,
        *length.stride(),
        bounds,
        workspace.first[layer],
        workspace.partial,
        workspace.partial_lse,
        scale * math.log2(math.e),
        entries,
        num_heads,
        GROUP=group,
        ROWS=max(16, next_power_of_2(group)),
        D=head_dim,
        TILE=workspace.config.tile,
        num_warps=workspace.config.num_warps,
        num_stages=workspace.config.num_stages,
    )
    merge_partials_kernel[(entries * group,)](
        workspace.partial,
        workspace.partial_lse,
        bounds,
        out,
        out.stride(0),
        out.stride(1),
        workspace.lse if lse is None else lse,
        entries,
        num_heads,
        workspace.num_programs,
        GROUP=group,
        D=head_dim,
        BLOCK=_MERGE_BLOCK,
    )
