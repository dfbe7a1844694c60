"""What single policies promise beyond the oracle tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tca_runtime.sparsity.policies import Candidates
from tca_runtime.sparsity.policies.pages import PagesPolicy
from tca_runtime.sparsity.policies.retrieval import H2OPolicy, QuestPolicy, TopKPolicy

HEADS, GROUP, DIM, COUNT, BLOCK = 2, 3, 8, 96, 32


def candidates(seed: int = 0) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(HEADS * COUNT, 2, DIM, generator=generator)
    slots = torch.randperm(HEADS * COUNT, generator=generator).view(HEADS, COUNT)
    probes = torch.randn(5, HEADS * GROUP, DIM, generator=generator)
    importance = torch.rand(HEADS, COUNT, generator=generator)
    return Candidates(importance, probes, BLOCK, DIM**-0.5, pool, slots)


def test_quest_bounds_every_key_of_a_page() -> None:
    given = candidates()
    bounds = QuestPolicy(page=16, queries=1).rank(given)
    query = given.probes[-1].view(HEADS, GROUP, DIM)
    logits = torch.einsum("hgd,hnd->hgn", query, given.keys)
    assert bool((bounds + 1e-5 >= logits.sum(1)).all())
    pages = bounds.view(HEADS, -1, 16)
    assert bool((pages == pages[..., :1]).all())
    expected = torch.maximum(
        query[:, :, None] * given.keys.view(HEADS, -1, 16, DIM).amin(2)[:, None],
        query[:, :, None] * given.keys.view(HEADS, -1, 16, DIM).amax(2)[:, None],
    ).sum((1, 3))
    assert torch.allclose(pages[..., 0], expected, atol=1e-5)


def test_quest_takes_whole_pages() -> None:
    kept = np.full(HEADS, 48)
    chosen = QuestPolicy(page=16).choose(candidates(), np.zeros((HEADS, 6), np.int64), kept)
    by_page = chosen.view(HEADS, -1, 16).sum(-1)
    assert set(by_page.flatten().tolist()) == {0, 16}


def test_h2o_keeps_recent_tokens_and_heavy_hitters() -> None:
    given = candidates()
    kept = np.array([20, 41])
    chosen = H2OPolicy(recent=0.5).choose(given, np.zeros((HEADS, 6), np.int64), kept)
    assert chosen.sum(-1).tolist() == [20, 41]
    for head, recent in enumerate((10, 20)):
        assert bool(chosen[head, COUNT - recent :].all())
        older = given.importance[head, : COUNT - recent]
        wanted = torch.zeros_like(older, dtype=torch.bool)
        wanted[older.topk(int(kept[head]) - recent).indices] = True
        assert torch.equal(chosen[head, : COUNT - recent], wanted)


def test_top_k_is_blind_to_blocks() -> None:
    given = candidates()
    chosen = TopKPolicy().choose(given, np.zeros((HEADS, 6), np.int64), np.array([7, 7]))
    for head in range(HEADS):
        best = set(given.importance[head].topk(7).indices.tolist())
        assert set(chosen[head].nonzero()[:, 0].tolist()) == best


def peaked(place: int) -> Candidates:
    """All attention of head 0 on one token; head 1 attends evenly."""
    given = candidates()
    importance = torch.full((HEADS, COUNT), 1e-6)
    importance[0, place] = 0.9
    importance[1] = 1 / COUNT
    return Candidates(importance, given.probes, BLOCK, given.scale, given.pool, given.slots)


@pytest.mark.parametrize("score", ["hhi", "mass", "max"])
def test_what_follows_the_attended_page_is_kept(score: str) -> None:
    policy = PagesPolicy(page=8, score=score, after=2)
    chosen = policy.choose(peaked(37), np.zeros((HEADS, 6), np.int64), np.array([24, 24]))
    assert chosen[0].nonzero()[:, 0].tolist() == list(range(32, 56))
    assert int(chosen[1].sum()) == 24
    policy = PagesPolicy(page=8, score=score, after=0, before=1)
    chosen = policy.choose(peaked(37), np.zeros((HEADS, 6), np.int64), np.array([16, 16]))
    assert chosen[0].nonzero()[:, 0].tolist() == list(range(24, 40))


def test_single_tokens_come_before_pages() -> None:
    given = candidates()
    policy = PagesPolicy(page=16, after=0, tokens=50)
    chosen = policy.choose(given, np.zeros((HEADS, 6), np.int64), np.array([32, 32]))
    for head in range(HEADS):
        assert int(chosen[head].sum()) == 32
        assert bool(chosen[head, given.importance[head].topk(16).indices].all())


def test_a_page_may_be_all_there_is() -> None:
    given = candidates()
    policy = PagesPolicy(page=32, after=9, before=9)
    kept = np.array([40, 40])
    assert policy.choose(given, np.zeros((HEADS, 6), np.int64), kept).sum(1).tolist() == [40, 40]
