"""TCA on real models: a budget of everything is full attention, token for token."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from benchmark.in_process import InProcessServer
from tca_runtime.calibration.options import DEFAULT_DATA
from tca_runtime.config import CacheArgs, ModelArgs, RuntimeConfig, SchedulerArgs, SparsityArgs
from tca_runtime.fetch_model import KNOWN_MODELS, cache_dir
from tca_runtime.tokenizer.loading import load_tokenizer

pytestmark = pytest.mark.slow

PROMPT, NEW_TOKENS = 800, 12


def is_cached(name: str) -> bool:
    return (cache_dir() / name / KNOWN_MODELS[name].file_name).is_file()


@pytest.fixture(scope="module", params=["smollm2-135m", "qwen2.5-coder-0.5b"])
def model(request: pytest.FixtureRequest) -> Iterator[ModelArgs]:
    if request.param != "smollm2-135m" and not is_cached(request.param):
        pytest.skip(f"{request.param} is not in the cache (python -m tca_runtime.fetch_model)")
    yield ModelArgs(model_path=request.param, device="cpu")


@pytest.fixture(scope="module")
def prompt(model: ModelArgs) -> list[int]:
    text = json.loads((DEFAULT_DATA / "chat.jsonl").read_text().splitlines()[0])["text"]
    ids: list[int] = load_tokenizer(model).encode(text)
    return ids[-PROMPT:]


def server(model: ModelArgs, tca_config: str, chunk: int) -> InProcessServer:
    return InProcessServer(
        RuntimeConfig(
            model=model,
            cache=CacheArgs(max_total_tokens=3 * PROMPT),
            scheduler=SchedulerArgs(max_running_requests=2, chunked_prefill_size=chunk),
            sparsity=SparsityArgs(
                tca_config=tca_config, tca_window=64, tca_min_candidates=64, host_cache_size=0
            ),
        )
    )


def test_keeping_everything_is_full_attention(model: ModelArgs, prompt: list[int]) -> None:
    serving = server(model, "uniform:1.0", 512)
    full = serving.ask([prompt], NEW_TOKENS, tca=False)[0]
    serving.engine.cache.flush()
    everything = serving.ask([prompt], NEW_TOKENS)[0]
    assert everything.token_ids == full.token_ids
    assert everything.tca is not None
    assert everything.tca["kept_ratio"] == 1 and everything.tca["dropped_mass"] == 0
    # With its prefix cached, and by the request's own wish.
    assert serving.ask([prompt], NEW_TOKENS)[0].token_ids == full.token_ids
    assert serving.ask([prompt], NEW_TOKENS, kept_ratio=1.0)[0].token_ids == full.token_ids
    # The test could tell the difference.
    assert serving.ask([prompt], NEW_TOKENS, kept_ratio=0.02)[0].token_ids != full.token_ids
