"""Host time per decode step and per prefill chunk, by part of the runtime.

Run from the root of the repository: ``python -m benchmark.bench_host_time``.

A random model with as many (layer, KV head) rows as an 8B model but tiny ones otherwise runs on
the CPU under the real scheduler. Every part's functions are timed without what they call of other
parts. *model* (the forward pass with its kernels) and *selection* (scores, and the views chosen
from them) are what a GPU computes; the rest is the host's, and must stay small against a step. On
the CPU it includes the data that bookkeeping moves (slot ids into the arena, the free list), which
a GPU's host only launches.

The time of ``other`` is the scheduler's own: what is left of an iteration.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmark.figures import Figure, load_before, save_figures
from tca_runtime.cache.manager import CacheManager
from tca_runtime.cache.views import ViewTable
from tca_runtime.config import CacheArgs, ModelArgs, RuntimeConfig, SchedulerArgs, SparsityArgs
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.output import LaunchedStep
from tca_runtime.engine.sampler import Sampler
from tca_runtime.messages import AbortRequest
from tca_runtime.models.decoder import Decoder, DecoderPass
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler import scheduler
from tca_runtime.scheduler.in_memory import in_memory_scheduler
from tca_runtime.scheduler.planner import StepPlanner
from tca_runtime.scheduler.scheduler import Scheduler
from tca_runtime.sparsity.chooser import ChunkSelection, StepSelection

# Part, and the functions that belong to it.
PARTS: list[tuple[str, type[Any] | ModuleType, tuple[str, ...]]] = [
    ("model", Decoder, ("forward", "logits")),
    ("model", DecoderPass, ("advance", "hidden")),
    ("selection planning", ChunkSelection, ("plan",)),
    ("selection", StepSelection, ("__call__", "decode_view")),
    ("planner", StepPlanner, ("plan",)),
    ("cache: reserve", CacheManager, ("reserve",)),
    ("cache: extend", CacheManager, ("extend",)),
    ("cache: match, begin", CacheManager, ("match", "begin")),
    ("cache: commit", CacheManager, ("commit",)),
    ("cache: show", CacheManager, ("show",)),
    ("cache: release", CacheManager, ("release",)),
    ("cache: parts of a sequence", CacheManager, ("parts",)),
    ("views: lists of the step", ViewTable, ("lists", "last_slots", "advance")),
    ("step input", scheduler, ("step_input",)),
    ("engine", Engine, ("launch",)),
    ("sampler", Sampler, ("sample",)),
    ("outputs", LaunchedStep, ("sample", "result")),
    ("consume", Scheduler, ("_consume",)),
]
OTHER = "other"
# What a GPU computes; the host only launches it.
DEVICE = {"model", "selection"}


class Clock:
    """Exclusive time of parts: while one runs inside another, only the inner one is counted."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def wrap(self, owner: type[Any] | ModuleType, function: str, name: str) -> None:
        """Count every call of a method, static method or module's function under ``name``."""
        raw = owner.__dict__[function]
        inner: Callable[..., Any] = raw.__func__ if isinstance(raw, staticmethod) else raw

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, function, staticmethod(timed) if isinstance(raw, staticmethod) else timed)

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now


class Server:
    """Scheduler and engine in this process, with the rows of a large model."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        write_config(directory, args.layers, args.kv_heads)
        tokens = args.batch * (args.context + args.steps + 64) + args.prompt + 1024
        config = RuntimeConfig(
            model=ModelArgs(model_path=str(directory), load_format="dummy", device="cpu"),
            cache=CacheArgs(max_total_tokens=tokens),
            scheduler=SchedulerArgs(
                max_running_requests=args.batch + 1, chunked_prefill_size=args.chunk
            ),
            sparsity=SparsityArgs(
                disable_tca=args.dense, tca_config=None if args.dense else "uniform:0.39"
            ),
        )
        self.engine = Engine(config)
        self.scheduler, self.inbox, _ = in_memory_scheduler(config, self.engine, 1 << 20)
        self.rng = np.random.default_rng(0)

    def submit(self, length: int, new_tokens: int) -> None:
        ids = self.rng.integers(0, 256, length).astype("<i4")
        sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        self.inbox.submit(ids.tobytes().hex()[:16], ids, sampling)

    def run_until_idle(self) -> None:
        self.scheduler.run_once()
        while not self.scheduler.planner.is_idle:
            self.scheduler.run_once()


def write_config(directory: Path, layers: int, kv_heads: int) -> None:
    """A Llama whose sizes are tiny but for its number of (layer, KV head) rows."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": 64,
        "num_attention_heads": kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 260,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1 << 20,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "torch_dtype": "float32",
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config))


def decode_parts(server: Server, clock: Clock, args: argparse.Namespace) -> dict[str, float]:
    """Mean seconds per decode step and part, with all requests decoding."""
    for _ in range(args.batch):
        server.submit(args.context, args.steps + 1000)
    planner = server.scheduler.planner
    while len(planner.running) < args.batch or planner.prefilling:
        server.scheduler.run_once()
    for _ in range(8):
        server.scheduler.run_once()
    clock.seconds.clear()
    with clock.part(OTHER):
        for _ in range(args.steps):
            server.scheduler.run_once()
    found = {name: seconds / args.steps for name, seconds in clock.seconds.items()}
    server.inbox.messages.append(AbortRequest(rid=""))
    server.run_until_idle()
    return found


def prefill_parts(server: Server, clock: Clock, args: argparse.Namespace) -> dict[str, float]:
    """Mean seconds per chunk and part, over one long prompt from admission to release."""
    chunks = -(-args.prompt // args.chunk)
    clock.seconds.clear()
    server.submit(args.prompt, 1)
    with clock.part(OTHER):
        server.run_until_idle()
    return {name: seconds / chunks for name, seconds in clock.seconds.items()}


def table(title: str, parts: dict[str, float]) -> list[Figure]:
    host = sum(seconds for name, seconds in parts.items() if name not in DEVICE)
    figures = [Figure(f"{title}: host, all parts", host * 1e6, "us")]
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        share = "" if name in DEVICE else f"{100 * seconds / host:.0f} % of the host's"
        figures.append(Figure(f"{title}: {name}", seconds * 1e6, "us", detail=share))
    width = max(len(f.name) for f in figures)
    for figure in figures:
        print(f"{figure.name:<{width}} {figure.value:10.0f} us   {figure.detail}")
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; always ends with 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.bench_host_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="requests that decode (8)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each (1024)")
    parser.add_argument("--steps", type=int, default=200, help="decode steps measured (200)")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prompt (8192)")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a chunk (2048)")
    parser.add_argument("--dense", action="store_true", help="full attention")
    args = parser.parse_args(argv)
    load_before()
    # The model is too small for more, and threads that wait for one another disturb the rest.
    torch.set_num_threads(1)
    clock = Clock()
    for name, owner, functions in PARTS:
        for function in functions:
            clock.wrap(owner, function, name)
    with tempfile.TemporaryDirectory() as directory:
        server = Server(args, Path(directory))
        server.submit(args.chunk, 4)
        server.run_until_idle()
        figures = table(f"decode step of {args.batch}", decode_parts(server, clock, args))
        print()
        figures += table(f"chunk of {args.chunk}", prefill_parts(server, clock, args))
    print(f"written to {save_figures('host_time', vars(args), figures, {})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
