"""Views: slot lists and contiguous copies, against plain indexing."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import random_lists, random_pool, slots_of

from tca_kernels.gather import ViewTables, gather_views, view_slots, view_slots_by_tables
from tca_kernels.select import Selection


def random_selection(candidates: torch.Tensor, device: torch.device) -> Selection:
    chosen = [torch.rand(n) < 0.4 for n in candidates.flatten().tolist()]
    sizes = torch.tensor([0, *(int(c.sum()) for c in chosen)])
    indices = torch.cat([c.nonzero().squeeze(1) for c in chosen]).to(torch.int32)
    return Selection(indices.to(device), sizes.cumsum(0), torch.zeros(len(chosen), device=device))


@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_view_is_kept_candidates_then_the_rest(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        monkeypatch.setattr("tca_kernels.dispatch.use_triton", lambda tensor: False)
    lengths = torch.tensor([[1500, 7], [64, 2300]])
    candidates = torch.tensor([[1200, 0], [64, 2000]])
    arena, start, _ = random_lists(lengths)
    selection = random_selection(candidates, device)
    view = view_slots(arena.to(device), start.to(device), candidates, lengths, selection)
    bounds = selection.indptr.tolist()
    slots, indptr = view.slots.cpu().long(), view.indptr.tolist()
    for row, entries in enumerate(slots_of(arena, start, lengths)):
        kept = selection.indices[bounds[row] : bounds[row + 1]].cpu().long()
        expected = torch.cat((entries[kept], entries[candidates.flatten()[row] :]))
        assert torch.equal(slots[indptr[row] : indptr[row + 1]], expected)
    assert indptr[-1] == len(slots)


@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_tables_of_several_layers_give_the_views_of_each(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        monkeypatch.setattr("tca_kernels.dispatch.use_triton", lambda tensor: False)
    lengths, candidates = torch.tensor([[30, 7], [64, 90]]), torch.tensor([[16, 0], [64, 48]])
    arena, start, _ = random_lists(lengths)
    arena, start = arena.to(device), start.to(device)
    selections = [random_selection(candidates, device) for _ in range(3)]
    kept = torch.stack([selection.indptr for selection in selections])
    tables = ViewTables.build(candidates, lengths, kept, device)
    for own, selection in zip(tables, selections, strict=True):
        found = view_slots_by_tables(arena, start, selection, own)
        expected = view_slots(arena, start, candidates, lengths, selection)
        assert torch.equal(found.slots, expected.slots)
        assert torch.equal(found.indptr, expected.indptr)


def test_refuses_tables_of_another_selection(device: torch.device) -> None:
    lengths = torch.tensor([[4]])
    arena, start, _ = random_lists(lengths)
    nothing = Selection(
        torch.empty(0, dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(1, device=device),
    )
    (tables,) = ViewTables.build(lengths, lengths, torch.tensor([[0, 3]]), device)
    with pytest.raises(ValueError, match="3 kept entries, not 0"):
        view_slots_by_tables(arena.to(device), start.to(device), nothing, tables)


def test_items_may_share_a_list(device: torch.device) -> None:
    arena, start, _ = random_lists(torch.tensor([[50, 60]]))
    lengths, candidates = torch.tensor([[30, 30], [50, 60]]), torch.tensor([[16, 16], [32, 48]])
    selection = random_selection(candidates, device)
    shared = start.to(device).expand(2, 2)
    view = view_slots(arena.to(device), shared, candidates, lengths, selection)
    first = int(start[0, 1])
    tail = view.slots[view.indptr[1] : view.indptr[2]][-14:]
    assert torch.equal(tail.cpu(), arena[first + 16 : first + 30])


def test_items_of_one_head_may_share_a_list(device: torch.device) -> None:
    """Their ``start`` is expanded over its only element, which flattening does not copy."""
    arena, start, _ = random_lists(torch.tensor([[50]]))
    start = torch.cat((start, start + 1000))[:1].to(device)
    nothing = Selection(
        torch.empty(0, dtype=torch.int32, device=device),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(3, device=device),
    )
    lengths = torch.tensor([[50], [40], [30]])
    view = view_slots(
        arena.to(device), start.expand(3, 1), torch.zeros_like(lengths), lengths, nothing
    )
    first = int(start[0, 0])
    for row, length in enumerate(lengths.flatten().tolist()):
        part = view.slots[view.indptr[row] : view.indptr[row + 1]]
        assert torch.equal(part.cpu(), arena[first : first + length])


@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_gather_copies_rows(
    backend: str,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "reference":
        monkeypatch.setattr("tca_kernels.dispatch.use_triton", lambda tensor: False)
    slots = torch.randint(0, 200, (77,), dtype=torch.int32)
    kv = random_pool(200, head_dim, dtype, device, slots.unique())
    keys, values = gather_views(kv, slots.to(device))
    assert torch.equal(keys, kv[slots.long(), 0])
    assert torch.equal(values, kv[slots.long(), 1])


def test_gather_into_given_buffers(device: torch.device) -> None:
    kv = torch.randn(10, 2, 32, device=device)
    scratch = torch.full((2, 5, 32), torch.nan, device=device)
    slots = torch.tensor([3, 3, 9], dtype=torch.int32, device=device)
    gather_views(kv, slots, scratch[0, :3], scratch[1, :3])
    assert torch.equal(scratch[0, :3], kv[[3, 3, 9], 0])
    assert torch.equal(scratch[1, :3], kv[[3, 3, 9], 1])
    assert scratch[:, 3:].isnan().all()
    gather_views(kv, slots[:0], scratch[0, :0], scratch[1, :0])
