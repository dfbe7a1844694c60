"""Block scores and selection: reference against plain Python, kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import relative_error
from torch import Tensor

from tca_kernels import reference
from tca_kernels.select import (
    BlockScore,
    Selection,
    SelectTables,
    block_scores,
    select,
    select_by_tables,
)

KINDS: list[BlockScore] = ["raw-hhi", "normalised-hhi", "mass"]


def random_counts(row_blocks: Tensor, num_levels: int) -> Tensor:
    """Distribute each row's blocks over the levels at random."""
    counts = torch.zeros(len(row_blocks), num_levels, dtype=torch.int64)
    for row, blocks in enumerate(row_blocks.tolist()):
        for level in torch.randint(0, num_levels, (blocks,)).tolist():
            counts[row, level] += 1
    return counts


def tied_scores(n: int) -> Tensor:
    """Scores with many exact zeros and repeats; exact in float32, so sums cannot differ."""
    return torch.randint(0, 6, (n,)).float() / 64


def select_naively(
    scores: Tensor, block_score: Tensor, row_blocks: Tensor, level_counts: Tensor, descending: bool
) -> tuple[list[list[int]], list[float]]:
    """Sorting of Python tuples, level k keeping 2^k."""
    block = scores.numel() // block_score.numel()
    sign = -1.0 if descending else 1.0
    kept: list[list[int]] = []
    dropped: list[float] = []
    base = 0
    for row, blocks in enumerate(row_blocks.tolist()):
        order = sorted(range(blocks), key=lambda b: (sign * float(block_score[base + b]), b))
        budgets = [2**k for k, n in enumerate(level_counts[row].tolist()) for _ in range(n)]
        places: list[int] = []
        for b, budget in zip(order, budgets, strict=True):
            inside = scores[(base + b) * block : (base + b + 1) * block].tolist()
            best = sorted(range(block), key=lambda j: (-inside[j], j))
            places += [b * block + j for j in best[:budget]]
        row_scores = scores[base * block : (base + blocks) * block].tolist()
        kept.append(sorted(places))
        dropped.append(math.fsum(row_scores) - math.fsum(row_scores[j] for j in places))
        base += blocks
    return kept, dropped


def rows_of(selection: Selection) -> list[list[int]]:
    bounds = selection.indptr.tolist()
    indices = selection.indices.tolist()
    return [indices[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [8, 64])
def test_block_scores(kind: BlockScore, block: int, device: torch.device) -> None:
    scores = torch.rand(37 * block, device=device) ** 4
    scores[block : 2 * block] = 0
    result = block_scores(scores, block, kind)
    blocks = scores.double().cpu().view(-1, block)
    expected = {
        "raw-hhi": (blocks**2).sum(1),
        "normalised-hhi": ((blocks / blocks.sum(1, True).clamp(min=1e-300)) ** 2).sum(1),
        "mass": blocks.sum(1),
    }[kind]
    assert relative_error(result, expected) < 1e-6
    assert relative_error(reference.block_scores(scores, block, kind), expected) < 1e-6


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize("ties", [False, True])
def test_selection_is_the_sorted_one(
    descending: bool,
    backend: str,
    ties: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "reference":
        monkeypatch.setattr("tca_kernels.dispatch.use_triton", lambda tensor: False)
    row_blocks = torch.tensor([13, 0, 1, 140])
    n = int(row_blocks.sum()) * 8
    scores = tied_scores(n) if ties else torch.rand(n)
    score_of_blocks = reference.block_scores(scores, 8, "raw-hhi")
    counts = random_counts(row_blocks, 4)
    selection = select(
        scores.to(device),
        score_of_blocks.to(device),
        row_blocks,
        counts,
        (1, 2, 4, 8),
        descending=descending,
    )
    kept, dropped = select_naively(scores, score_of_blocks, row_blocks, counts, descending)
    assert rows_of(selection) == kept
    torch.testing.assert_close(
        selection.dropped_mass.cpu(), torch.tensor(dropped, dtype=torch.float32)
    )


def test_blocks_of_64(device: torch.device) -> None:
    row_blocks = torch.tensor([9, 9])
    scores = torch.rand(18 * 64)
    score_of_blocks = reference.block_scores(scores, 64, "mass")
    counts = random_counts(row_blocks, 7)
    levels = (1, 2, 4, 8, 16, 32, 64)
    inputs = (scores.to(device), score_of_blocks.to(device), row_blocks, counts, levels)
    kept, _ = select_naively(scores, score_of_blocks, row_blocks, counts, False)
    assert rows_of(select(*inputs)) == kept


def test_equal_scores_keep_the_lowest_indices(device: torch.device) -> None:
    scores = torch.zeros(3 * 8, device=device)
    flat = torch.zeros(3, device=device)
    counts = torch.tensor([[1, 1, 0, 1]])
    selection = select(scores, flat, torch.tensor([3]), counts, (1, 2, 4, 8))
    assert selection.indices.tolist() == [0, 8, 9, *range(16, 24)]
    assert selection.dropped_mass.tolist() == [0.0]


def test_any_float_ranks_like_its_value(device: torch.device) -> None:
    order = torch.tensor([3.0, -0.0, -2.5, 0.0, -torch.inf, 1e-40, torch.inf, -2.5], device=device)
    counts = torch.ones(1, 8, dtype=torch.int64)
    scores = torch.ones(8 * 8, device=device)
    for descending in (False, True):
        by_rank = order.cpu().argsort(stable=True, descending=descending).tolist()
        chosen = select(
            scores, order, torch.tensor([8]), counts, tuple(range(8)), descending=descending
        )
        kept = (chosen.indices // 8).bincount(minlength=8).tolist()
        assert [kept[block] for block in by_rank] == list(range(8))


def test_a_level_may_keep_nothing(device: torch.device) -> None:
    scores = torch.tensor([0.25, 0.0, 0.125, 0.5], device=device)
    order = torch.tensor([0.0, 1.0], device=device)
    selection = select(scores, order, torch.tensor([2]), torch.tensor([[1, 1]]), (0, 1))
    assert selection.indices.tolist() == [3]
    assert selection.dropped_mass.tolist() == [0.375]


def test_scores_that_are_no_numbers_keep_to_their_place(device: torch.device) -> None:
    """A request whose K overflowed must not write into others' selections."""
    scores = torch.full((2 * 8,), torch.nan, device=device)
    scores[8:] = torch.arange(8.0)
    order = torch.tensor([1.0, 0.0], device=device)
    selection = select(scores, order, torch.tensor([2]), torch.tensor([[1, 1]]), (2, 3))
    assert selection.indptr.tolist() == [0, 5]
    assert len({*selection.indices.tolist()} & {*range(8)}) == 3
    assert selection.indices[3:].tolist() == [14, 15]


@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_tables_of_several_layers_select_as_the_counts_of_each(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        monkeypatch.setattr("tca_kernels.dispatch.use_triton", lambda tensor: False)
    row_blocks, levels = torch.tensor([5, 0, 70]), (1, 2, 4, 8)
    counts = torch.stack([random_counts(row_blocks, 4) for _ in range(3)])
    scores = torch.rand(75 * 8, device=device)
    order = block_scores(scores, 8)
    tables = SelectTables.build(row_blocks, counts, levels, device)
    for own, layer_counts in zip(tables, counts, strict=True):
        found = select_by_tables(scores, order, own, descending=True)
        expected = select(scores, order, row_blocks, layer_counts, levels, descending=True)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.indptr, expected.indptr)
        torch.testing.assert_close(found.dropped_mass, expected.dropped_mass)


def test_no_candidates_select_nothing(device: torch.device) -> None:
    empty = torch.empty(0, device=device)
    counts = torch.zeros(2, 4, dtype=torch.int64)
    selection = select(
        block_scores(empty, 8), empty, torch.zeros(2, dtype=torch.int64), counts, (1, 2, 4, 8)
    )
    assert selection.indptr.tolist() == [0, 0, 0]
    assert selection.indices.numel() == 0
    assert selection.dropped_mass.tolist() == [0.0, 0.0]


def test_refuses_counts_that_do_not_fit() -> None:
    scores, order = torch.rand(16), torch.rand(2)
    with pytest.raises(ValueError, match="exactly the blocks"):
        select(scores, order, torch.tensor([2]), torch.tensor([[1, 0]]), (1, 2))
    with pytest.raises(ValueError, match="3 blocks, but 2"):
        select(scores, order, torch.tensor([3]), torch.tensor([[3, 0]]), (1, 2))
    with pytest.raises(ValueError, match="whole blocks"):
        block_scores(scores, 3)
    with pytest.raises(ValueError, match="none of raw-hhi"):
        block_scores(scores, 8, "entropy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level_counts must be on the host"):
        SelectTables.build(
            torch.tensor([2]), torch.tensor([[[1, 1]]], device="meta"), (1, 2), scores.device
        )
