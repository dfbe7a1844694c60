"""Values between host and device without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tca_kernels.dispatch import upload

__all__ = ["download", "upload", "upload_floats", "upload_ints"]


def download(tensor: Tensor) -> Tensor:
    """Copy to the host; on CUDA into pinned memory, valid once the stream has got there."""
    return tensor.to("cpu", non_blocking=True)


def upload_ints(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 ``[len(values)]``"""
    return upload(torch.tensor(values, dtype=torch.int64), device)


def upload_floats(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 ``[len(values)]``"""
    return upload(torch.tensor(values, dtype=torch.float32), device)
