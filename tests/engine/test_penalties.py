"""Penalties follow the counts of prompt and output, whatever rows come and go."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from tca_runtime.engine.penalties import TokenCounts

VOCAB = 40
CPU = torch.device("cpu")


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_repetition_is_hugging_faces() -> None:
    counts = TokenCounts(VOCAB, CPU)
    prompt = torch.tensor([3, 3, 7])
    rows = torch.tensor([counts.open(prompt)])
    counts.record(rows, torch.tensor([11]))
    logits = torch.randn(1, VOCAB)
    ours = logits.clone()
    counts.penalise(ours, rows, column(1.7), column(0.0), column(0.0))
    seen = torch.tensor([[3, 3, 7, 11]])
    torch.testing.assert_close(ours, RepetitionPenaltyLogitsProcessor(1.7)(seen, logits))


def test_frequency_and_presence_count_the_output_only() -> None:
    counts = TokenCounts(VOCAB, CPU)
    rows = torch.tensor([counts.open(torch.tensor([1, 1, 2]))])
    for token in (5, 5, 5, 2):
        counts.record(rows, torch.tensor([token]))
    logits = torch.zeros(1, VOCAB)
    counts.penalise(logits, rows, column(1.0), column(0.5), column(0.25))
    expected = torch.zeros(VOCAB)
    expected[5], expected[2] = -3 * 0.5 - 0.25, -0.5 - 0.25
    torch.testing.assert_close(logits[0], expected)


def expected_row(
    logits: np.ndarray, prompt: list[int], output: list[int], settings: tuple[float, float, float]
) -> np.ndarray:
    repetition, frequency, presence = settings
    result = logits.copy()
    for token in set(prompt) | set(output):
        value = result[token]
        result[token] = value / repetition if value > 0 else value * repetition
    for token, count in Counter(output).items():
        result[token] -= frequency * count + presence
    return result


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_rows_come_and_go(data: st.DataObject) -> None:
    tokens = st.integers(0, VOCAB - 1)
    counts = TokenCounts(VOCAB, CPU)
    live: dict[int, tuple[list[int], list[int]]] = {}
    for _ in range(data.draw(st.integers(5, 25))):
        action = data.draw(st.sampled_from(["open", "close", "step", "step"]))
        if action == "open" or not live:
            prompt = data.draw(st.lists(tokens, max_size=6))
            row = counts.open(torch.tensor(prompt, dtype=torch.int64))
            assert row not in live
            live[row] = (prompt, [])
        elif action == "close":
            row = data.draw(st.sampled_from(sorted(live)))
            counts.close(row)
            del live[row]
        else:
            chosen = sorted(data.draw(st.sets(st.sampled_from(sorted(live)), min_size=1)))
            new = [data.draw(tokens) for _ in chosen]
            counts.record(torch.tensor(chosen), torch.tensor(new))
            for row, token in zip(chosen, new, strict=True):
                live[row][1].append(token)
    rows = sorted(live)
    assert counts.num_rows == len(rows)
    if not rows:
        return
    wanted = [(1.0 + 0.1 * i, 0.3 * i, 0.2) for i in range(len(rows))]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1))
    ours = logits.clone()
    columns = [column(*values) for values in zip(*wanted, strict=True)]
    counts.penalise(ours, torch.tensor(rows), *columns)
    for i, row in enumerate(rows):
        expected = expected_row(logits[i].numpy(), *live[row], wanted[i])
        np.testing.assert_allclose(ours[i].numpy(), expected, rtol=1e-5, atol=1e-6)
