"""The whole engine on a GPU against the same engine on the CPU."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tca_runtime.messages import AbortRequest
from tests.gpu.tiny import Loop, loop, random_prompts, write_model

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


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 1, "top_p": 0.9},
    {"temperature": 0.8, "seed": 2, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.8, "seed": 3, "min_new_tokens": 9, "stop_token_ids": tuple(range(0, 256, 5))},
]


@pytest.mark.parametrize("tca", [None, "uniform:0.3"], ids=["dense", "tca"])
def test_overlap_does_not_change_tokens(model: Path, tca: str | None) -> None:
    """Requests of several lengths and kinds, stops in mid-flight, some behind cached prefixes."""
    prompts = random_prompts([40, 900, 1500, 300, 700, 1200], seed=6)

    def serve(engine: Loop) -> list[list[list[int]]]:
        return [engine.generate(prompts, 40, **kind) for kind in KINDS]

    expected = serve(loop(model, "cuda", "triton", tca=tca, disable_overlap=True))
    assert serve(loop(model, "cuda", "triton", tca=tca)) == expected


@pytest.mark.parametrize("backend", ["triton", "torch"], ids=["graphs", "eager"])
def test_crowded_overlap_answers_as_a_roomy_server(model: Path, backend: str) -> None:
    """Retractions, and aborts of requests whose step is in flight."""
    prompts = random_prompts([400, 500, 600, 450], seed=7)
    expected = loop(model, "cuda", backend).generate(prompts, 150)
    crowded = loop(model, "cuda", backend, tokens=1800)
    for number in range(3):
        crowded.submit(f"{number}-aborted", random_prompts([300], seed=number)[0], 150)
        for i, prompt in enumerate(prompts):
            crowded.submit(f"{number}-{i}", prompt, 150)
        for _ in range(12 + number):
            crowded.scheduler.run_once()
        crowded.inbox.messages.append(AbortRequest(rid=f"{number}-aborted"))
        crowded.scheduler.run_once()
        while not crowded.scheduler.planner.is_idle:
            crowded.scheduler.run_once()
    crowded.engine.cache.check()
    assert crowded.scheduler.planner.num_retractions > 0
    answers: dict[str, list[int]] = defaultdict(list)
    finishes: Counter[str] = Counter()
    for output in crowded.outbox.outputs:
        answers[output.rid] += output.token_ids
        finishes[output.rid] += output.finish is not None
    assert set(finishes.values()) == {1} and len(finishes) == 15
    for number in range(3):
        assert [answers[f"{number}-{i}"] for i in range(4)] == expected


def test_the_host_waits_for_tokens_only(model: Path) -> None:
    """Reserving slots, growing views, launching and sampling: none synchronises."""
    engine = loop(model, "cuda", "triton")
    for i, prompt in enumerate(random_prompts([40, 300, 700], seed=9)):
        engine.submit(str(i), prompt, 700, **KINDS[i])
    while len(engine.scheduler.planner.running) < 3:
        engine.scheduler.run_once()
    for _ in range(5):
        engine.scheduler.run_once()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(600):
            engine.scheduler.run_once()
            assert engine.scheduler._in_flight is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while not engine.scheduler.planner.is_idle:
        engine.scheduler.run_once()


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
