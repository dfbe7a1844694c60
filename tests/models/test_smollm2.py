"""The default model, end to end: the same numbers as transformers' own GGUF loader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tca_runtime.config import DEFAULT_MODEL, CacheArgs, ModelArgs, RuntimeConfig, SparsityArgs
from tca_runtime.engine.engine import Engine
from tca_runtime.fetch_model import fetch
from tca_runtime.models.base import CausalLM
from tca_runtime.models.loader import load_model
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.tokenizer.loading import load_tokenizer
from tests.models.checkpoints import logits_of
from tests.scheduler.fakes import InMemoryScheduler, NoGrammars

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
]


pytestmark = pytest.mark.slow


QUESTIONS = [
    "What is the capital of Italy?", "Name three colours.", "Count from one to ten.",
    "Why is the sky blue?", "Write a haiku about rain.", "What is 12 times 12?",
    "Translate 'good morning' to French.", "Who wrote Hamlet?", "What do bees make?",
    "Explain gravity to a child.", "List the planets.", "What is a prime number?",
    "How do I boil an egg?", "Give a synonym of fast.", "What year has 366 days?",
    "Describe a cat.", "What is Python?", "Is water wet?", "Tell a short joke.", "What is ice?",
]  # fmt: skip
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(ModelArgs(device="cpu")).model


@pytest.fixture(scope="module")
def reference() -> Any:
    path = fetch(DEFAULT_MODEL)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


def encode(prompt: str) -> torch.Tensor:
    return torch.tensor(load_tokenizer(ModelArgs()).encode(prompt))


def test_logits_equal_transformers(model: CausalLM, reference: Any) -> None:
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


def test_greedy_text_equals_transformers(reference: Any) -> None:
    """Twenty prompts at once through scheduler, cache and engine, against one by one."""
    tokenizer = load_tokenizer(ModelArgs())
    config = RuntimeConfig(
        model=ModelArgs(device="cpu"),
        cache=CacheArgs(max_total_tokens=8000),
        sparsity=SparsityArgs(disable_tca=True, host_cache_size=0.0),
    )
    server = InMemoryScheduler(config, Engine(config), NoGrammars(), 8192)
    prompts = []
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
    for i, question in enumerate(QUESTIONS):
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
        server.send(str(i), prompts[-1], sampling)
    server.run()
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            theirs = reference.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        assert tokenizer.decode(server.tokens(str(i))) == tokenizer.decode(theirs[0, len(prompt) :])
