"""A launched step: which rows draw, when, and where their tokens go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tca_runtime.engine.grammar import GrammarMatcher
from tca_runtime.engine.output import LaunchedStep
from tca_runtime.engine.sampler import RowSampling, Sampler
from tca_runtime.engine.step import ChunkInput, DecodeInput, LogprobWish, StepInput
from tca_runtime.sampling_params import SamplingParams

VOCAB, HIDDEN = 64, 16
CPU = torch.device("cpu")


class Alternates(GrammarMatcher):
    """Allows one token, another one after it has been accepted, and so on."""

    def __init__(self) -> None:
        self.next = 10

    def fill(self, bitmask: Tensor, row: int) -> None:
        bits = np.zeros(VOCAB, dtype=np.uint8)
        bits[self.next] = 1
        bitmask[row] = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))

    def accept(self, token: int) -> None:
        assert token == self.next
        self.next += 1


class Linear:
    """The part of a model that a launched step uses."""

    def __init__(self) -> None:
        self.head = torch.randn(HIDDEN, VOCAB, generator=torch.Generator().manual_seed(0))

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head


def greedy() -> RowSampling:
    return RowSampling(SamplingParams(temperature=0.0), 0, np.zeros(1, dtype=np.int32))


def sequence(index: int) -> Any:
    return SimpleNamespace(view=SimpleNamespace(index=index))


def chunk(index: int, size: int, sampling: RowSampling | None, **fields: Any) -> ChunkInput:
    tokens = np.arange(size, dtype=np.int32)
    return ChunkInput(sequence(index), tokens, torch.empty(0), sampling, **fields)


def launch(step: StepInput, hidden: Tensor, buffer: Tensor, **fields: Any) -> LaunchedStep:
    model: Any = Linear()
    views = [None] * len(step.chunks)
    return LaunchedStep(model, Sampler(VOCAB, CPU), step, hidden, views, buffer, **fields)


def test_tokens_go_to_the_rows_of_their_requests_in_input_order() -> None:
    hidden = torch.randn(2 + 3 + 4 + 2, HIDDEN)
    wish = LogprobWish(top_k=2)
    step = StepInput(
        [DecodeInput(sequence(5), greedy()), DecodeInput(sequence(0), greedy(), wish)],
        [
            chunk(3, 3, None),
            chunk(6, 4, greedy(), logprobs=wish, prompt_targets=np.array([7, 8], dtype=np.int32)),
            chunk(1, 2, greedy()),
        ],
    )
    buffer = torch.full((8,), -1)
    output = launch(step, hidden, buffer).result()
    best = Linear().logits(hidden).argmax(-1).tolist()
    assert output.decode_tokens == best[:2]
    assert output.chunk_tokens == [None, best[8], best[10]]
    assert buffer.tolist() == [best[1], best[10], -1, -1, -1, best[0], best[8], -1]
    assert [entry is None for entry in output.decode_logprobs] == [True, False]
    assert [entry is None for entry in output.chunk_logprobs] == [True, False, True]
    assert output.decode_logprobs[1] is not None
    assert output.decode_logprobs[1].token[1] == best[1]
    assert [[e.token[1] for e in entries] for entries in output.prompt_logprobs] == [[], [7, 8], []]


def test_a_grammar_delays_the_draw_until_it_knows_the_last_token() -> None:
    row, buffer = greedy(), torch.full((2,), -1)
    row.matcher = Alternates()
    step = StepInput([DecodeInput(sequence(0), row), DecodeInput(sequence(1), greedy())], [])
    first = launch(step, torch.randn(2, HIDDEN), buffer)
    assert buffer.tolist() == [-1, -1]
    first.sample()
    assert buffer[0] == 10
    second = launch(step, torch.randn(2, HIDDEN), buffer)
    row.accept(first.result().decode_tokens[0])
    second.sample()
    assert buffer[0] == 11
    assert second.result().decode_tokens == buffer.tolist()


def test_sampling_twice_draws_once() -> None:
    row, buffer = greedy(), torch.zeros(1, dtype=torch.int64)
    launched = launch(StepInput([DecodeInput(sequence(0), row)], []), torch.randn(1, 16), buffer)
    launched.sample()
    assert launched.result() == launched.result()
    assert row.num_drawn == 1


@pytest.mark.parametrize("known", [False, True])
def test_places_may_be_on_the_device_already(known: bool) -> None:
    hidden, buffer = torch.randn(2, HIDDEN), torch.zeros(4, dtype=torch.int64)
    step = StepInput([DecodeInput(sequence(i), greedy()) for i in (3, 1)], [])
    places = torch.tensor([3, 1]) if known else None
    tokens = launch(step, hidden, buffer, places=places).result().decode_tokens
    assert buffer.tolist() == [0, tokens[1], 0, tokens[0]]


def test_a_step_that_draws_nothing_ends_too() -> None:
    buffer = torch.zeros(1, dtype=torch.int64)
    output = launch(StepInput([], [chunk(0, 4, None)]), torch.randn(4, HIDDEN), buffer).result()
    assert (output.decode_tokens, output.chunk_tokens) == ([], [None])
