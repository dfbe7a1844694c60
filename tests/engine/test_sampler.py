"""Draws follow each request's settings, and nothing but its own row decides them."""

import gc
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tca_runtime.engine.grammar import GrammarError, GrammarMatcher
from tca_runtime.engine.sampler import RowSampling, Sampler
from tca_runtime.sampling_params import SamplingParams

VOCAB = 64
EOS = frozenset({2, 3})
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def make_row(seed: int = 0, prompt: Sequence[int] = (1, 5, 9), **params: Any) -> RowSampling:
    ids = np.array(prompt, dtype=np.int32)
    return RowSampling(SamplingParams(**params), seed, ids, EOS)


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


class OnlyAllows(GrammarMatcher):
    """A grammar that allows a fixed set of tokens for ever."""

    def __init__(self, *allowed: int) -> None:
        self.allowed = allowed

    def fill(self, bitmask: Tensor, row: int) -> None:
        bits = np.zeros(VOCAB, dtype=np.uint8)
        bits[list(self.allowed)] = 1
        packed = np.packbits(bits, bitorder="little").view(np.int32)
        bitmask[row] = torch.from_numpy(packed.copy())

    def accept(self, token: int) -> None:
        if token not in self.allowed:
            raise GrammarError(f"token {token}")


def generate(
    sampler: Sampler, logits: Sequence[Tensor], rows: Sequence[RowSampling]
) -> list[list[int]]:
    """One step per element of ``logits``; returns each row's tokens."""
    output: list[list[int]] = [[] for _ in rows]
    for step in logits:
        for row, tokens, token in zip(
            rows, output, sampler.sample(step, rows).tolist(), strict=True
        ):
            row.accept(token)
            tokens.append(token)
    return output


def test_greedy_takes_the_best_token() -> None:
    sampler, logits = Sampler(VOCAB, CPU), random_logits(3)
    rows = [make_row(temperature=0.0), make_row(top_k=1), make_row(temperature=0.0, top_p=0.1)]
    assert torch.equal(sampler.sample(logits, rows), logits.argmax(-1))


@pytest.mark.parametrize(
    ("params", "weights"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.01]),
        ({"temperature": 2.0}, [0.5**0.5, 0.25**0.5, 0.15**0.5, 0.1**0.5]),
        ({"top_k": 2}, [0.5, 0.25, 0, 0]),
        ({"top_p": 0.8}, [0.5, 0.25, 0.15, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.5, 0.25, 0, 0]),
        ({"min_p": 0.4}, [0.5, 0.25, 0, 0]),
        ({"logit_bias": {0: -100.0, 3: float(np.log(3))}}, [0, 0.25, 0.15, 0.3]),
        ({"presence_penalty": 1.0}, [0.5, 0.25, 0.15, 0.1]),
    ],
)
def test_frequencies_match_the_distribution(params: Any, weights: list[float]) -> None:
    n = 4000
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(n, 4)
    rows = [make_row(seed, prompt=(0,), **params) for seed in range(n)]
    counts = Counter(Sampler(4, CPU).sample(logits, rows).tolist())
    expected = np.array(weights) / sum(weights) * n
    assert all(counts[t] == 0 for t in range(4) if weights[t] == 0)
    possible = expected > 0
    observed = np.array([counts[t] for t in range(4)])
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    # At most 3 degrees of freedom: beyond 21 lies one in ten thousand.
    assert chi_square < 21


def test_one_seed_draws_anew_at_every_position() -> None:
    n = 4000
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    output = generate(Sampler(3, CPU), [logits] * n, [make_row(7, min_new_tokens=0)])[0]
    observed = np.array([output.count(t) for t in range(3)])
    expected = np.array([0.6, 0.3, 0.1]) * n
    assert ((observed - expected) ** 2 / expected).sum() < 18
    pairs = Counter(zip(output, output[1:], strict=False))
    assert abs(pairs[0, 0] / (n - 1) - 0.36) < 0.04


row_settings = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**40),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([-1, 1, 5, 20, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "min_new_tokens": st.sampled_from([0, 3]),
        "logit_bias": st.sampled_from([{}, {4: 2.0, 9: -3.0}]),
    }
)


@given(wanted=st.lists(row_settings, min_size=1, max_size=6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_rows_text_does_not_depend_on_its_batch(
    wanted: list[dict[str, Any]], data: st.DataObject
) -> None:
    steps = 5
    logits = [random_logits(len(wanted), seed) for seed in range(steps)]
    alone = [
        generate(Sampler(VOCAB, CPU), [step[i : i + 1] for step in logits], [make_row(**w)])[0]
        for i, w in enumerate(wanted)
    ]
    # The same requests, but in every step some batch of them, in any order.
    sampler, rows = Sampler(VOCAB, CPU), [make_row(**w) for w in wanted]
    output: list[list[int]] = [[] for _ in rows]
    while unfinished := [i for i, tokens in enumerate(output) if len(tokens) < steps]:
        batch = data.draw(st.permutations(unfinished))
        batch = batch[: data.draw(st.integers(1, len(batch)))]
        step = torch.stack([logits[len(output[i])][i] for i in batch])
        tokens = sampler.sample(step, [rows[i] for i in batch]).tolist()
        for i, token in zip(batch, tokens, strict=True):
            output[i].append(token)
            rows[i].accept(token)
    assert output == alone


def test_the_logits_are_left_alone() -> None:
    logits = random_logits(2)
    before = logits.clone()
    rows = [make_row(frequency_penalty=1.0, logit_bias={3: 5.0}, top_p=0.5), make_row(min_p=0.1)]
    rows[1].matcher = OnlyAllows(4, 5)
    Sampler(VOCAB, CPU).sample(logits, rows)
    assert torch.equal(logits, before)


def test_penalties_count_what_was_drawn() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([1.0, 0.9, 0.8, 0.7])
    rows = [make_row(temperature=0.0, frequency_penalty=0.15)]
    output = generate(Sampler(VOCAB, CPU), [logits] * 8, rows)[0]
    counts: Counter[int] = Counter()
    for token in output:
        scores = [float(logits[0, t]) - 0.15 * counts[t] for t in range(4)]
        assert scores[token] >= max(scores) - 1e-6
        counts[token] += 1
    assert len(counts) == 4


def test_repetition_penalty_sees_the_prompt() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.5
    rows = [make_row(prompt=(5,), temperature=0.0, repetition_penalty=2.0)]
    assert Sampler(VOCAB, CPU).sample(logits, rows).item() == 6


def test_a_request_that_is_gone_frees_its_counts() -> None:
    sampler = Sampler(VOCAB, CPU)
    for _ in range(50):
        sampler.sample(random_logits(1), [make_row(presence_penalty=1.0)])
    sampler.sample(random_logits(1), [make_row()])
    gc.collect()
    assert sampler.num_count_rows == 0


def test_end_and_stop_tokens_wait_for_the_minimum() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 3], logits[0, 8], logits[0, 9] = 9.0, 8.0, 7.0, 6.0
    rows = [make_row(temperature=0.0, min_new_tokens=2, stop_token_ids=(8,))]
    assert generate(Sampler(VOCAB, CPU), [logits] * 4, rows)[0] == [9, 9, 2, 2]


def test_a_grammar_overrules_everything() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 40] = 10.0
    rows = [
        make_row(temperature=0.0),
        make_row(temperature=0.0, min_new_tokens=5),
        make_row(top_k=1000, top_p=0.01, min_new_tokens=5, logit_bias={2: -100.0}),
    ]
    rows[0].matcher = OnlyAllows(7, 30)
    rows[1].matcher = rows[2].matcher = OnlyAllows(2)
    assert Sampler(VOCAB, CPU).sample(logits, rows).tolist() == [7, 2, 2]


@pytest.mark.parametrize("temperature", [1.0, 0.01, float("inf")])
def test_random_draws_stay_inside_the_grammar(temperature: float) -> None:
    rows = [make_row(seed, temperature=temperature) for seed in range(50)]
    for row in rows:
        row.matcher = OnlyAllows(11, 63)
    tokens = Sampler(VOCAB, CPU).sample(random_logits(50), rows)
    assert set(tokens.tolist()) <= {11, 63}


def test_infinite_temperature_is_uniform() -> None:
    rows = [make_row(seed, temperature=float("inf")) for seed in range(2000)]
    logits = torch.tensor([[30.0, 0.0, -30.0, -60.0]]).expand(2000, 4)
    counts = Counter(Sampler(4, CPU).sample(logits, rows).tolist())
    assert all(abs(counts[t] - 500) < 100 for t in range(4))


def test_a_matcher_that_refuses_is_an_error() -> None:
    row = make_row()
    row.matcher = OnlyAllows(4)
    with pytest.raises(GrammarError, match="token 5"):
        row.accept(5)


def test_a_batch_is_rebuilt_only_when_its_rows_change() -> None:
    sampler, rows = Sampler(VOCAB, CPU), [make_row(0), make_row(1)]
    batch = sampler.batch(rows)
    assert sampler.batch(list(rows)) is batch
    assert sampler.batch(rows[::-1]) is not batch


@pytest.mark.gpu
@needs_gpu
def test_no_step_waits_for_the_device() -> None:
    device = torch.device("cuda")
    sampler = Sampler(VOCAB, device)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1, "min_new_tokens": 3},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"logit_bias": {4: 2.0}},
    ]
    rows = [make_row(seed, **kind) for seed, kind in enumerate(kinds)]
    rows[1].matcher = OnlyAllows(5, 6)
    logits = random_logits(len(rows))
    on_device = logits.to(device)
    sampler.sample(on_device, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(on_device, rows)
        tokens = sampler.sample(on_device, rows[::-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.device.type == "cuda"


@pytest.mark.gpu
@needs_gpu
def test_devices_draw_the_same_tokens() -> None:
    n = 256
    logits = random_logits(n, vocab=5000)
    params: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.8}, {"min_p": 0.1}]

    def rows() -> list[RowSampling]:
        return [make_row(seed, **params[seed % 4]) for seed in range(n)]

    on_cpu = Sampler(5000, CPU).sample(logits, rows())
    on_gpu = Sampler(5000, torch.device("cuda")).sample(logits.cuda(), rows()).cpu()
    # Only draws that nearly tie may differ.
    assert (on_cpu != on_gpu).sum() <= 1
