"""The runtime's engine and scheduler in this process, switched between configurations."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmark.quality.configurations import LIMITS, Configuration
from tca_runtime.config import (
    AttentionArgs,
    CacheArgs,
    ModelArgs,
    RuntimeConfig,
    SchedulerArgs,
    SparsityArgs,
)
from tca_runtime.engine.engine import Engine
from tca_runtime.messages import LogprobOptions, TokenOutput
from tca_runtime.models.loader import LoadedModel, load_model
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.in_memory import in_memory_scheduler
from tca_runtime.sparsity.core import SharedCore
from tca_runtime.sparsity.load import shipped

# Drawn tokens that tell how sure the model was: most answers of the lab are that long.
SURE_TOKENS = 12
# Settings of the loop on each kind of device: requests that decode together, tokens per step.
BATCH = {"cuda": (64, 8192), "cpu": (8, 2048)}


class LabError(RuntimeError):
    """The runtime refused or aborted a request of the lab."""


@dataclass(frozen=True)
class Ask:
    """A prompt to continue greedily; nothing is generated with ``max_new_tokens`` 0."""

    rid: str
    ids: list[int]
    max_new_tokens: int
    extra_key: str | None = None
    logprobs: LogprobOptions | None = None


@dataclass
class Reply:
    """What came back, as ``meta_info`` would tell it."""

    ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    tca: dict[str, Any] | None = None
    outputs: list[TokenOutput] = field(default_factory=list)

    @property
    def sure(self) -> float:
        """The least probability that one of the first tokens had when it was drawn.

        Without the very first, which the prompt's last tokens draw: they see everything.
        """
        entries = [e for output in self.outputs for e in output.output_logprobs or []]
        drawn = [logprob for logprob, _ in entries[1:SURE_TOKENS] if logprob is not None]
        return math.exp(min(drawn, default=0.0))


class Lab:
    """One engine over a model that is in memory; configurations come and go.

    Parameters
    ----------
    tokens : capacity of the KV pool, None for what the device has
    host_gib : size of the host tier
    retention : as ``--tca-retention``; with ``never`` configurations whose prompts have the same
        K and V share what is cached
    core : which slots stay when prefixes shrink, ``budgeted`` or ``shared``
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokens: int | None = None,
        host_gib: float = 0.0,
        retention: str = "never",
        max_running: int | None = None,
        backend: str = "auto",
        core: str = "budgeted",
    ) -> None:
        batch, chunk = BATCH[loaded.device.type]
        self.config = RuntimeConfig(
            cache=CacheArgs(max_total_tokens=tokens),
            scheduler=SchedulerArgs(
                max_running_requests=max_running or batch,
                max_queued_requests=1 << 20,
                chunked_prefill_size=chunk,
                schedule_policy="fcfs",
                # Nobody reads along: what counts is when the last answer is there.
                max_decode_slowdown=0.0,
            ),
            attention=AttentionArgs(attention_backend=backend),
            sparsity=SparsityArgs(
                disable_tca=True, tca_retention=retention, host_cache_size=host_gib
            ),
        )
        self.engine = Engine(self.config, loaded)
        self.engine.warm_up()
        self.configuration: Configuration | None = None
        self._prefill_key: str | None = None
        self._core = core

    @property
    def capacity(self) -> int:
        """Tokens that fit into the KV pool."""
        return self.engine.cache.capacity_tokens

    def use(self, configuration: Configuration) -> None:
        """Select by ``configuration`` from now on; drops prefixes it could not have computed."""
        shape = self.engine.shape
        file = shipped(self.engine.identity, SparsityArgs().tca_threshold)
        settings = configuration.settings(shape.num_layers, shape.num_kv_heads, file)
        self.engine.use_sparsity(settings)
        reclaimer = self.engine.cache.reclaimer
        if settings is not None and self._core == "shared":
            reclaimer.choose_core = SharedCore(settings, shape.rows)
        if self._core == "budgeted":
            reclaimer.choose_repeated = None
        if configuration.prefill_key != self._prefill_key:
            self.engine.cache.flush()
        self._prefill_key = configuration.prefill_key
        self.configuration = configuration
        length = self.engine.model_config.max_position
        made = in_memory_scheduler(self.config, self.engine, length)
        self.scheduler, self._inbox, self._outbox = made
        self.scheduler.stream_interval = float("inf")

    def flush(self) -> None:
        self.engine.cache.flush()

    def generate(
        self, asks: Sequence[Ask], done: Callable[[str], Any] = lambda rid: None
    ) -> dict[str, Reply]:
        """Run all requests together; replies by ``rid``.

        Raises
        ------
        LabError
            When a request was refused or aborted.
        """
        assert self.configuration is not None
        limits = {name: getattr(self.configuration, name) for name in LIMITS}
        custom = {name: limit for name, limit in limits.items() if limit is not None}
        for ask in asks:
            sampling = SamplingParams(
                max_new_tokens=ask.max_new_tokens, temperature=0.0, custom_params=custom
            )
            wish = ask.logprobs or LogprobOptions(len(ask.ids))
            self._inbox.submit(ask.rid, ask.ids, sampling, extra_key=ask.extra_key, logprobs=wish)
        replies = {ask.rid: Reply() for ask in asks}
        left = len(replies)
        while left:
            self.scheduler.run_once()
            for output in self._outbox.outputs:
                left -= self._take(output, replies[output.rid])
                if output.finish is not None:
                    done(output.rid)
            self._outbox.outputs.clear()
        # On a GPU what ended last may be in one more step; the next scheduler would not release it.
        while not self.scheduler.planner.is_idle:
            self.scheduler.run_once()
        return replies

    @staticmethod
    def _take(output: TokenOutput, reply: Reply) -> bool:
        reply.ids += output.token_ids
        reply.outputs.append(output)
        reply.cached_tokens = output.cached_tokens
        reply.tca = output.tca or reply.tca
        if output.finish is not None and output.finish.type == "abort":
            raise LabError(f"{output.rid}: {output.finish.message}")
        return output.finish is not None


def load(model: str, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load a model once, for all labs of this process."""
    begin = time.perf_counter()
    loaded = load_model(ModelArgs(model_path=model, device=device, dtype=dtype))
    print(f"loaded {model} in {time.perf_counter() - begin:.1f} s on {loaded.device}", flush=True)
    return loaded


def release() -> None:
    """Give memory of dropped labs back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
