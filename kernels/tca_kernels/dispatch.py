"""Which implementation a public function runs: Triton on CUDA, numba on the CPU, else torch."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and _has("triton")


@functools.cache
def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def use_numba(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and _has("numba")


def compile_for_cpu() -> None:
    """Compile the numba kernels of a model's layers now, so that no request waits for it.

    Takes seconds the first time; later processes load them from numba's cache.
    """
    if not _has("numba"):
        return
    from tca_kernels.cpu import elementwise, linear

    elementwise.rms_norm_kernel()
    elementwise.rotate_kernel()
    linear.linear_kernel()
    linear.gated_kernel()


def cpu_parts(work: int, per_thread: int) -> int:
    """Threads that share ``work`` items on the CPU; the calling thread's kernels run on them."""
    from tca_kernels.cpu.jit import use_threads

    return use_threads(min(torch.get_num_threads(), 1 + work // per_thread))


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def upload(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small host table to the device without waiting for the device."""
    if device.type == "cuda" and table.numel():
        # From pageable memory the copy may wait for the stream.
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def host_table(table: Tensor, name: str) -> Tensor:
    """The table as int64.

    Raises
    ------
    ValueError
        If it is not on the host: reading it would make the host wait for the device.
    """
    if table.device.type != "cpu":
        raise ValueError(f"{name} must be on the host, not on {table.device}")
    return table.long()


def check_pool(kv: Tensor, head_dim: int) -> None:
    """Refuse what the kernels' addressing does not cover.

    Raises
    ------
    ValueError
        If ``kv`` is not a contiguous ``[num_slots, 2, head_dim]`` pool, or ``head_dim`` is not a
        power of two of at least 16.
    """
    if kv.dim() != 3 or tuple(kv.shape[1:]) != (2, head_dim) or not kv.is_contiguous():
        raise ValueError(
            f"kv must be contiguous [num_slots, 2, {head_dim}], not {tuple(kv.shape)} "
            f"with strides {kv.stride()}"
        )
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim must be a power of two >= 16, not {head_dim}")


def check_lists(**lists: Tensor) -> None:
    """Refuse lists with a stride, which the kernels would misread on a GPU only.

    Raises
    ------
    ValueError
        If one is not contiguous, naming it.
    """
    for name, tensor in lists.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, not {tuple(tensor.shape)} "
                f"with strides {tensor.stride()}"
            )
