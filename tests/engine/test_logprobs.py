"""Logprobs are the raw distribution's, whatever each row asks for."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tca_runtime.engine.logprobs import PROMPT_SLICE, prompt_logprobs, token_logprobs
from tca_runtime.engine.step import LogprobWish, PositionLogprobs

VOCAB = 50

wish_strategy = st.builds(
    LogprobWish,
    top_k=st.sampled_from([0, 1, 3, VOCAB, VOCAB + 10]),
    token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=4).map(tuple),
)


def check(entry: PositionLogprobs, logits: torch.Tensor, target: int, wish: LogprobWish) -> None:
    reference = logits.double().log_softmax(-1).numpy()
    best = np.argsort(-reference)[: wish.top_k]
    expected = [target, *best.tolist(), *wish.token_ids]
    entries = [entry.token, *entry.top]
    assert [token for _, token in entries] == expected
    values = np.array([value for value, _ in entries])
    np.testing.assert_allclose(values, reference[expected], rtol=1e-4, atol=1e-5)
    assert all(type(value) is float and type(token) is int for value, token in entries)


@given(wishes=st.lists(wish_strategy, min_size=1, max_size=6), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_row_gets_what_it_asked_for(wishes: list[LogprobWish], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(wishes), VOCAB, generator=generator) * 5
    targets = torch.randint(VOCAB, (len(wishes),), generator=generator)
    before = logits.clone()
    entries = token_logprobs(logits, targets, wishes).entries()
    assert torch.equal(logits, before)
    for i, (entry, wish) in enumerate(zip(entries, wishes, strict=True)):
        check(entry, logits[i], int(targets[i]), wish)


def test_extreme_logits_stay_finite_and_at_most_zero() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    wish = LogprobWish(top_k=3)
    for entry in token_logprobs(logits, torch.tensor([0, 1]), [wish, wish]).entries():
        values = [value for value, _ in [entry.token, *entry.top]]
        assert all(value is not None and -3e4 < value <= 0 for value in values)


def test_prompt_logits_are_made_in_slices() -> None:
    positions = 2 * PROMPT_SLICE + 17
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, 8, generator=generator)
    head = torch.randn(8, VOCAB, generator=generator)
    targets = np.random.default_rng(0).integers(0, VOCAB, positions).astype(np.int32)
    sizes: list[int] = []

    def project(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return states @ head

    wish = LogprobWish(top_k=2, token_ids=(7,))
    parts = prompt_logprobs(project, hidden, targets, wish)
    entries = [entry for part in parts for entry in part.entries()]
    assert max(sizes) <= PROMPT_SLICE
    assert len(entries) == positions == sum(sizes)
    for i in range(0, positions, 53):
        check(entries[i], hidden[i] @ head, int(targets[i]), wish)
