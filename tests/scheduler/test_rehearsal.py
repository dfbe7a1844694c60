"""Requests that a server makes up before it is ready."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tca_runtime.cache.reclaim import ReclaimCounts
from tca_runtime.config import (
    CacheArgs,
    ModelArgs,
    RuntimeConfig,
    SchedulerArgs,
    SparsityArgs,
)
from tca_runtime.engine.engine import Engine
from tca_runtime.scheduler.rehearsal import OUTPUT, SHORT, rehearse
from tests.gpu.tiny import loop, random_prompts, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


def configuration(model: Path, tokens: int, tca: bool = True) -> RuntimeConfig:
    sparsity = SparsityArgs(
        tca_config="uniform:0.3" if tca else None,
        disable_tca=not tca,
        tca_window=64,
        tca_min_candidates=128,
    )
    return RuntimeConfig(
        model=ModelArgs(model_path=str(model), device="cpu"),
        cache=CacheArgs(max_total_tokens=tokens),
        scheduler=SchedulerArgs(max_running_requests=4, chunked_prefill_size=512),
        sparsity=sparsity,
    )


@pytest.mark.parametrize("tca", [True, False])
@pytest.mark.parametrize("retention", ["on-pressure", "immediate"])
def test_a_rehearsal_leaves_nothing_behind(model: Path, tca: bool, retention: str) -> None:
    config = configuration(model, 20000, tca)
    config = replace(config, sparsity=replace(config.sparsity, tca_retention=retention))
    engine = Engine(config)
    free = engine.cache.usage()
    assert rehearse(config, engine, 9000) == 512 + (4096 if tca else 0) + SHORT
    assert engine.cache.usage() == free
    assert engine.cache.reclaimer.counts == ReclaimCounts()
    engine.cache.check()


def test_it_refreshes_and_selects(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What clients would otherwise wait for first."""
    config = configuration(model, 20000)
    engine = Engine(config)
    refreshed: list[int] = []
    original = Engine._refreshed

    def counting(self: Engine, step: object) -> object:
        views = original(self, step)
        refreshed.append(sum(view is not None for view in views))
        return views

    monkeypatch.setattr(Engine, "_refreshed", counting)
    rehearse(config, engine, 9000)
    assert sum(refreshed) == 3, "the long prompt, and two that begin with it"
    assert max(refreshed) == 2, "these at once"


@pytest.mark.parametrize(
    "tokens, context, length", [(900, 4000, 300), (9000, 500, 500), (240, 99, 0)]
)
def test_little_memory_or_a_short_context_makes_it_shorter(
    model: Path, tokens: int, context: int, length: int
) -> None:
    config = configuration(model, tokens)
    found = rehearse(config, Engine(config), context)
    assert found == max(0, length - 2 * SHORT - 16 - OUTPUT)


def test_tokens_afterwards_are_those_without(model: Path) -> None:
    prompts = random_prompts([700, 300])
    plain = loop(model, "cpu", tca="uniform:0.3").generate(prompts, 24)
    rehearsed = loop(model, "cpu", tca="uniform:0.3")
    config = configuration(model, 30000)
    assert rehearse(config, rehearsed.engine, 9000) > 0
    assert rehearsed.generate(prompts, 24) == plain
