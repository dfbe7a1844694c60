"""The core context of cold prefixes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.core import BudgetedCore, SharedCore
from tca_runtime.sparsity.policies import create_policy
from tca_runtime.sparsity.settings import SparsitySettings

LAYERS, HEADS, TOKENS, BLOCK = 2, 3, 160, 16
ROWS = LAYERS * HEADS


def settings(ratio: float) -> SparsitySettings:
    table = BudgetTable.uniform(ratio, LAYERS, HEADS, BLOCK)
    return SparsitySettings(create_policy("tca"), table, table)


def prefix() -> HeadSlots:
    slots = torch.arange(1, ROWS * TOKENS + 1, dtype=torch.int32).view(ROWS, TOKENS)
    return HeadSlots.full(0, slots)


def chosen(core: BudgetedCore | SharedCore, importance: Tensor) -> Tensor:
    keep = core(prefix(), importance)
    assert keep is not None
    return keep.view(ROWS, TOKENS)


@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
def test_heads_share_one_budget(floor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # Heads differ a lot in how much of their attention goes to the prefix.
    importance = torch.rand(ROWS, TOKENS, generator=generator)
    importance *= torch.tensor([1.0, 4.0, 0.1, 9.0, 0.5, 2.0])[:, None]
    wanted = settings(0.3)
    budget = wanted.decode.kept_tokens(TOKENS // BLOCK).reshape(-1)
    shared = chosen(SharedCore(wanted, ROWS, floor), importance.flatten())
    assert (
        shared.sum()
        == budget.sum()
        == chosen(BudgetedCore(wanted, ROWS), importance.flatten()).sum()
    )
    least = (budget * floor).astype(int)
    assert all(int(n) >= m for n, m in zip(shared.sum(1), least, strict=True))
    if floor == 1.0:
        assert shared.sum(1).tolist() == budget.tolist()
    else:
        assert int(shared[3].sum()) > budget[3]
    # Each head keeps its best.
    for row in range(ROWS):
        inside, outside = importance[row][shared[row]], importance[row][~shared[row]]
        assert not len(inside) or not len(outside) or float(inside.min()) >= float(outside.max())
    # Beyond the floors, no dropped token is worth more than a kept one of another head.
    free = [
        importance[row][shared[row]].sort(descending=True).values[least[row] :]
        for row in range(ROWS)
    ]
    if floor < 1.0:
        assert float(torch.cat(free).min()) >= float(importance[~shared].max())


def test_nothing_to_drop() -> None:
    everything = settings(1.0)
    importance = torch.rand(ROWS * TOKENS)
    assert SharedCore(everything, ROWS)(prefix(), importance) is None
    short = HeadSlots.full(0, torch.ones(ROWS, BLOCK - 1, dtype=torch.int32))
    assert SharedCore(settings(0.3), ROWS)(short, torch.rand(ROWS * (BLOCK - 1))) is None
