"""A scheduler over a real engine with a tiny random model, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tca_runtime.config import CacheArgs, ModelArgs, RuntimeConfig, SchedulerArgs, SparsityArgs
from tca_runtime.engine.engine import Engine
from tca_runtime.sampling_params import SamplingParams
from tests.scheduler.fakes import InMemoryScheduler, NoGrammars

WINDOW = 64


class Server(InMemoryScheduler):
    """Scheduler and engine in one process."""

    engine: Engine

    def __init__(
        self,
        tokens: int = 6000,
        host_gib: float = 0.0,
        chunk: int = 256,
        share: bool = True,
        overlap: bool = False,
        **sparsity: Any,
    ) -> None:
        settings = {
            "tca_config": "uniform:0.3",
            "tca_window": WINDOW,
            "tca_min_candidates": 64,
            "host_cache_size": host_gib,
            **sparsity,
        }
        config = RuntimeConfig(
            model=ModelArgs(load_format="dummy", model_config="tiny", device="cpu"),
            cache=CacheArgs(max_total_tokens=tokens, disable_radix_cache=not share),
            scheduler=SchedulerArgs(max_running_requests=4, chunked_prefill_size=chunk),
            sparsity=SparsityArgs(**settings),
        )
        engine = Engine(config)
        sharpen(engine)
        engine.is_asynchronous = overlap
        super().__init__(config, engine, NoGrammars(), 32768)

    def submit(self, rid: str, prompt: Sequence[int], max_new: int = 12, **params: Any) -> None:
        sampling = SamplingParams(
            max_new_tokens=max_new, temperature=0.0, ignore_eos=True, custom_params=params
        )
        self.send(rid, prompt, sampling)

    def ask(self, prompt: Sequence[int], max_new: int = 12, **params: Any) -> list[int]:
        rid = f"r{len(self.mail.outbound)}"
        self.submit(rid, prompt, max_new, **params)
        self.run()
        return self.tokens(rid)


def sharpen(engine: Engine) -> None:
    """Make a random model's attention selective and its output depend on it."""
    model: Any = engine.model
    for layer in model._layers:
        layer.attention.qkv.weight.mul_(12)
        layer.attention.output.weight.mul_(40)


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()
