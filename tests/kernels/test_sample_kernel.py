"""Nucleus and draws against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tca_kernels import reference
from tca_kernels.sample import gumbel_argmax, keep_top_p

P = (1e-9, 0.0137, 0.5, 0.9, 0.9507, 0.9999, 2.0)


def random_scores(width: int, scale: float, device: torch.device) -> Tensor:
    return torch.randn(len(P), width, device=device) * scale


def random_keys(rows: int, device: torch.device) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, 2), dtype=torch.int32, device=device)


@pytest.mark.parametrize("width", [1, 7, 9001])
@pytest.mark.parametrize("scale", [0.0, 4.0, 60.0])
def test_nucleus(width: int, scale: float, device: torch.device) -> None:
    scores = random_scores(width, scale, device)
    scores[:, 1::5] = -torch.inf
    p = torch.tensor(P, device=device)[:, None]
    kept = scores.clone()
    keep_top_p(kept, p)
    stays = torch.isfinite(kept)
    assert torch.equal(kept, scores.masked_fill(~stays, -torch.inf))
    assert stays.gather(1, scores.argmax(1, keepdim=True)).all()
    probs = scores.double().softmax(-1)
    # Each token stays just if those that are better hold less than p, up to rounding.
    for row, limit in enumerate(P):
        worst = probs[row, stays[row]].min()
        assert probs[row, probs[row] > worst].sum() < limit + 1e-5
        dropped = ~stays[row] & torch.isfinite(scores[row])
        if dropped.any():
            best_dropped = probs[row, dropped].max()
            assert probs[row, probs[row] > best_dropped].sum() > min(limit, 1) - 1e-5
            assert best_dropped <= worst * (1 + 1e-6)


def test_nucleus_keeps_what_the_reference_keeps(device: torch.device) -> None:
    scores = random_scores(3000, 3.0, device)
    p = torch.tensor(P, device=device)[:, None]
    ours, theirs = scores.clone(), scores.clone()
    keep_top_p(ours, p)
    reference.keep_top_p(theirs, p)
    # Sums of all but the last tokens may round to either side of p.
    assert (ours != theirs).sum(1).max() <= 1
    assert torch.equal(ours[-1], scores[-1])


def test_nucleus_keeps_equal_scores_together(device: torch.device) -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]], device=device)
    keep_top_p(scores, torch.tensor([[0.4]], device=device))
    assert torch.isfinite(scores[0]).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("width", [1, 40, 4096, 9001])
def test_draws(width: int, device: torch.device) -> None:
    scores = random_scores(width, 2.0, device)
    scores[:, ::3] = -torch.inf
    scores[:, 0] = -3.0
    keys = random_keys(len(scores), device)
    tokens = gumbel_argmax(scores, keys)
    assert tokens.dtype == torch.int64
    noisy = scores + reference.gumbel_noise(keys, width)
    best = noisy.max(1).values
    drawn = noisy.gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(drawn, best, atol=1e-4, rtol=1e-5)
    assert torch.isfinite(scores.gather(1, tokens[:, None])).all()


def test_noise_is_the_references(device: torch.device) -> None:
    """The large values too: they come from uniforms that ``1 - u`` would round away."""
    keys = random_keys(64, device)
    noise = reference.gumbel_noise(keys, 512)
    for place in noise.flatten().topk(20).indices.tolist():
        row, token = divmod(place, 512)
        # The best of two tokens changes where their scores differ by just the noise's difference.
        other = (token + 1) % 512
        gap = float(noise[row, token] - noise[row, other])
        scores = torch.full((2, 512), -torch.inf, device=device)
        scores[:, token] = 0.0
        scores[0, other], scores[1, other] = gap - 1e-3, gap + 1e-3
        drawn = gumbel_argmax(scores, keys[row].repeat(2, 1))
        assert drawn.tolist() == [token, other]


def test_rows_do_not_depend_on_each_other(device: torch.device) -> None:
    scores = random_scores(5000, 3.0, device)
    p = torch.tensor(P, device=device)[:, None]
    keys = random_keys(len(P), device)
    together = scores.clone()
    keep_top_p(together, p)
    tokens = gumbel_argmax(together, keys)
    for i in range(len(P)):
        alone = scores[i : i + 1].clone()
        keep_top_p(alone, p[i : i + 1])
        assert torch.equal(alone, together[i : i + 1])
        assert torch.equal(gumbel_argmax(alone, keys[i : i + 1]), tokens[i : i + 1])


def test_nan_draws_some_token_and_leaves_others_alone(device: torch.device) -> None:
    scores = torch.full((2, 9001), torch.nan, device=device)
    scores[1] = -torch.inf
    scores[1, 4711] = 1.0
    keep_top_p(scores, torch.tensor([[0.5], [0.9]], device=device))
    tokens = gumbel_argmax(scores, random_keys(2, device))
    assert 0 <= tokens[0] < 9001
    assert tokens[1] == 4711


def test_no_rows(device: torch.device) -> None:
    scores = torch.empty(0, 10, device=device)
    keep_top_p(scores, torch.empty(0, 1, device=device))
    assert gumbel_argmax(scores, random_keys(0, device)).shape == (0,)
