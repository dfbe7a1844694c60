"""The default model, end to end: the same numbers as transformers' own GGUF loader."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tca_runtime.config import DEFAULT_MODEL, ModelArgs
from tca_runtime.fetch_model import fetch
from tca_runtime.models.base import CausalLM
from tca_runtime.models.loader import load_model
from tca_runtime.tokenizer.loading import load_tokenizer
from tests.models.checkpoints import logits_of

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(ModelArgs(device="cpu")).model


def encode(prompt: str) -> torch.Tensor:
    return torch.tensor(load_tokenizer(ModelArgs()).encode(prompt))


def test_logits_equal_transformers(model: CausalLM) -> None:
    path = fetch(DEFAULT_MODEL)
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    for prompt in PROMPTS:
        ids = encode(prompt)
        with torch.inference_mode():
            expected = reference(ids[None]).logits[0]
        actual = logits_of(model, ids, [len(ids) - 2, 1, 1])
        assert (actual - expected).abs().max() < 1e-3
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))


def test_it_knows_the_capital_of_france(model: CausalLM) -> None:
    ids = encode(PROMPTS[0])
    best = logits_of(model, ids, [len(ids)])[-1].argmax()
    assert load_tokenizer(ModelArgs()).decode(best) == " Paris"
