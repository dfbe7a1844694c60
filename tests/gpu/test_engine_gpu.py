"""The whole engine on a GPU against the same engine on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.tiny import loop, random_prompts, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = [5, 300, 1200, 2600]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.mark.parametrize("tca", [None, "uniform:0.3"], ids=["dense", "tca"])
def test_greedy_tokens_equal_those_of_the_cpu(model: Path, tca: str | None) -> None:
    prompts = random_prompts(LENGTHS)
    on_cpu = loop(model, "cpu", "torch", tca=tca).generate(prompts, 24)
    on_gpu = loop(model, "cuda", "triton", tca=tca).generate(prompts, 24)
    assert on_gpu == on_cpu


def test_dense_tokens_equal_those_of_transformers(model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference = reference.to("cuda")
    prompts = random_prompts([7, 600, 1300], seed=8)
    found = loop(model, "cuda", "triton").generate(prompts, 24)
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        output = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
        )
        expected = output[0, len(prompt) :].tolist()
        # transformers forbids the end token to reach the minimum; compare up to where it would be.
        stop = tokens.index(257) if 257 in tokens else len(tokens)
        assert tokens[:stop] == expected[:stop]


def test_graphs_and_batch_size_do_not_change_tokens(model: Path) -> None:
    prompts = random_prompts([900, 40, 1500, 700, 300], seed=1)
    graphs = loop(model, "cuda", "triton")
    together = graphs.generate(prompts, 40)
    graphs.engine.cache.flush()
    alone = [graphs.generate([prompt], 40)[0] for prompt in prompts]
    assert together == alone
    eager = loop(model, "cuda", "torch")
    assert eager.generate(prompts, 40) == together


def test_prefix_cache_does_not_change_dense_tokens(model: Path) -> None:
    shared = random_prompts([1100], seed=2)[0]
    prompts = [shared + tail for tail in random_prompts([30, 200], seed=3)]
    engine = loop(model, "cuda", "triton")
    cold = [engine.generate([prompt], 16)[0] for prompt in prompts]
    assert [engine.generate([prompt], 16)[0] for prompt in prompts] == cold


@pytest.mark.parametrize("retention", ["immediate", "on-pressure"])
def test_cold_prefixes_shrink_and_come_back(model: Path, retention: str) -> None:
    """A pool too small for all prompts: nodes are demoted to pinned memory and promoted again."""
    engine = loop(
        model,
        "cuda",
        "triton",
        tca="uniform:0.3",
        retention=retention,
        tokens=4000,
        host_cache_size=0.05,
    )
    prompts = random_prompts([2000, 1800, 1900], seed=4)
    first = [engine.generate([prompt], 8)[0] for prompt in prompts]
    again = [engine.generate([prompt + [7]], 8)[0] for prompt in prompts]
    assert all(len(tokens) == 8 for tokens in first + again)
    counts = engine.engine.cache.reclaimer.counts
    if retention == "on-pressure":
        assert counts.demoted > 0 and counts.promoted > 0
    else:
        assert counts.pruned > 0


def test_demoted_prefixes_answer_as_if_they_had_stayed(model: Path) -> None:
    """Full attention needs every slot: one that is read before it is back shows in the tokens."""
    prompts = random_prompts([2000, 1800, 1900], seed=6)
    roomy = loop(model, "cuda", "triton", tokens=20000)
    expected = [roomy.generate([prompt], 12)[0] for prompt in prompts]
    tight = loop(model, "cuda", "triton", tokens=4000, host_cache_size=0.05)
    for _ in range(3):
        assert [tight.generate([prompt], 12)[0] for prompt in prompts] == expected
    counts = tight.engine.cache.reclaimer.counts
    assert counts.demoted > 0 and counts.promoted > 0
