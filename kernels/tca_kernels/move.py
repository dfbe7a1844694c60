"""Rows copied between a pool on the device and one in host memory."""

from __future__ import annotations

from torch import Tensor

from tca_kernels import dispatch
from tca_kernels.dispatch import cdiv, next_power_of_2

_TILE_BYTES = 8192


def move_rows(
    source: Tensor,
    source_rows: Tensor,
    target: Tensor,
    target_rows: Tensor,
    max_programs: int | None = None,
) -> None:
    """``target[target_rows] = source[source_rows]``, across devices.

    Between a GPU and pinned host memory the GPU itself reads or writes the host's rows, so that
    scattered rows cross the bus once and at its speed, without a staging copy.

    Parameters
    ----------
    source, target : ``[N, ...]`` and ``[M, ...]``, contiguous, of one dtype; a row's elements are
        a power of two
    source_rows, target_rows : int32 ``[n]``, contiguous, on any device
    max_programs : of the GPU's, so that other work finds room beside the copy

    Raises
    ------
    ValueError
        If anything is not contiguous, or a row of an unusual length goes through the GPU.
    """
    dispatch.check_lists(
        source=source, source_rows=source_rows, target=target, target_rows=target_rows
    )
    device = source.device if source.is_cuda else target.device
    pinned = all(pool.is_cuda or pool.is_pinned() for pool in (source, target))
    width = source[0].numel()
    if not (
        device.type == "cuda"
        and pinned
        and dispatch.use_triton(source if source.is_cuda else target)
    ):
        rows = source_rows.to(source.device).long()
        target[target_rows.to(target.device).long()] = source[rows].to(target.device)
        return
    if width != next_power_of_2(width):
        raise ValueError(f"rows must be a power of two long, not {width}")
    from tca_kernels.triton.move import move_kernel

    count = source_rows.numel()
    tile = min(max(1, _TILE_BYTES // (width * source.element_size())), 1024)
    if count:
        programs = cdiv(count, tile)
        if max_programs is not None:
            programs = min(programs, max_programs)
        move_kernel[(programs,)](
            source,
            source_rows.to(device),
            target,
            target_rows.to(device),
            count,
            WIDTH=width,
            TILE=tile,
        )
