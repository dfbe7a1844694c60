"""Filters keep the same tokens as Hugging Face's warpers, row by row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tca_runtime.engine.filters import TOP_P_OFF, keep_min_p, keep_top_k_top_p

NO_IDS = torch.zeros(1, 1, dtype=torch.int64)


def random_logits(seed: int, rows: int, vocab: int, scale: float) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_top_k_then_top_p(data: st.DataObject) -> None:
    rows, vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 300))
    logits = random_logits(data.draw(st.integers(0, 2**31)), rows, vocab, 3.0)
    ks = data.draw(st.lists(st.integers(1, vocab), min_size=rows, max_size=rows))
    # Away from round numbers, where the two ways to sum may round to either side.
    ps = data.draw(
        st.lists(st.sampled_from([0.0137, 0.311, 0.8013, 0.9507, TOP_P_OFF]), min_size=rows)
    )
    ps = ps[:rows]
    ours = logits.clone()
    keep_top_k_top_p(ours, torch.tensor(ks)[:, None], torch.tensor(ps)[:, None], max(ks))
    for i in range(rows):
        expected = TopKLogitsWarper(ks[i])(NO_IDS, logits[i : i + 1])
        if ps[i] < 1:
            expected = TopPLogitsWarper(ps[i])(NO_IDS, expected)
        assert torch.equal(ours[i], expected[0])


@given(seed=st.integers(0, 2**31), p=st.floats(0.001, 1.0), scale=st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_min_p(seed: int, p: float, scale: float) -> None:
    logits = random_logits(seed, 3, 100, scale)
    ours = logits.clone()
    keep_min_p(ours, torch.full((3, 1), p))
    expected = MinPLogitsWarper(p)(NO_IDS, logits)
    different = (ours != expected).nonzero()
    # Only a token whose ratio to the best equals p to float32 precision may differ.
    for row, token in different.tolist():
        ratio = (logits[row, token] - logits[row].max()).exp()
        assert abs(ratio - p) < 1e-5 * p


def test_equal_logits_stay_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    keep_top_k_top_p(logits, torch.tensor([[2]]), torch.tensor([[TOP_P_OFF]]), 2)
    assert torch.isfinite(logits[0]).tolist() == [False, True, True, True, False]


def test_rows_of_nan_do_not_break_their_neighbours() -> None:
    logits = torch.tensor([[torch.nan] * 3, [1.0, 2.0, 3.0]])
    keep_top_k_top_p(logits, torch.tensor([[2], [2]]), torch.tensor([[0.5], [0.9]]), 2)
    assert torch.isfinite(logits[1]).tolist() == [False, True, True]


def test_the_best_token_always_stays() -> None:
    logits = torch.tensor([[5.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]])
    keep_top_k_top_p(logits, torch.tensor([[3], [3]]), torch.tensor([[1e-9], [1e-9]]), 3)
    keep_min_p(logits, torch.ones(2, 1))
    assert torch.isfinite(logits).any(1).all()
    assert logits.argmax(1)[0] == 0
