"""Random pools and lists for the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest relative error (norm) by dtype of the pool.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random_pool(
    num_slots: int, head_dim: int, dtype: torch.dtype, device: torch.device, used: Tensor
) -> Tensor:
    """A pool whose slots outside ``used`` are NaN: reading one of them shows in every result."""
    kv = torch.full((num_slots, 2, head_dim), torch.nan)
    kv[used.cpu().long()] = torch.randn(len(used), 2, head_dim)
    return kv.to(dtype).to(device)


def random_lists(length: Tensor, spare: int = 3) -> tuple[Tensor, Tensor, int]:
    """Disjoint lists of random slots, for lengths of any shape.

    Returns
    -------
    ``arena`` int32 with gaps of slot 0 (never in a list) between the lists, ``start`` int64 like
    ``length``, and a number of slots larger than any id. All on the CPU.
    """
    sizes = length.flatten().long() + spare
    start = sizes.cumsum(0) - sizes
    total = int(sizes.sum())
    arena = torch.zeros(total, dtype=torch.int32)
    ids = torch.randperm(2 * total)[:total].to(torch.int32) + 1
    for s, n in zip(start.tolist(), length.flatten().tolist(), strict=True):
        arena[s : s + n] = ids[s : s + n]
    return arena, start.view(length.shape), 2 * total + 1


def slots_of(arena: Tensor, start: Tensor, length: Tensor) -> list[Tensor]:
    """The lists one by one, in the order of ``start.flatten()``."""
    bounds = zip(start.flatten().tolist(), length.flatten().tolist(), strict=True)
    return [arena[s : s + n].long() for s, n in bounds]


def relative_error(out: Tensor, expected: Tensor) -> float:
    out, expected = out.double().cpu(), expected.double().cpu()
    assert out.shape == expected.shape
    return float((out - expected).norm() / expected.norm().clamp(min=1e-30))
