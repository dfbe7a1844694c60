"""Multi-turn throughput of one model on one GPU, in this process: TCA, dense, transformers.

    PYTHONPATH=kernels:python:. python benchmark/gpu/bench_throughput.py model.gguf

Sessions talk in rounds: all send their next turn at once, history included, and all replies are
awaited before the next round. The tokens are random ids, the same for every side; what a token
is does not change how long it takes. Transformers' side is its continuous batching. Instead of a
GGUF file, a Hugging Face directory or the name of a shape with random weights (``llama-3.1-8b``).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from bench_run import BenchRun
from transformers_peer import TransformersPeer

from tca_runtime.config import (
    CacheArgs,
    ModelArgs,
    RuntimeConfig,
    SchedulerArgs,
    SparsityArgs,
)
from tca_runtime.engine.engine import Engine
from tca_runtime.models.config import NAMED_CONFIGS
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.in_memory import in_memory_scheduler
from tca_runtime.scheduler.rehearsal import rehearse

Prompts = list[list[int]]
Replies = tuple[Prompts, list[float]]
"""New tokens of each prompt, and the seconds until the first of them (empty if unknown)."""


class Runtime:
    """Scheduler and engine without processes, HTTP and text."""

    def __init__(
        self,
        model: ModelArgs,
        sessions: int,
        chunk: int,
        tca: str | None,
        min_confidence: float = 0.0,
    ) -> None:
        config = RuntimeConfig(
            model=model,
            cache=CacheArgs(mem_fraction=0.85),
            scheduler=SchedulerArgs(max_running_requests=sessions, chunked_prefill_size=chunk),
            sparsity=SparsityArgs(
                disable_tca=tca is None,
                tca_config=tca,
                tca_min_confidence=min_confidence,
                host_cache_size=0.0,
            ),
        )
        self.engine = Engine(config)
        self.engine.warm_up()
        length = self.engine.model_config.max_position
        # As a server does before it is ready.
        rehearse(config, self.engine, length)
        made = in_memory_scheduler(config, self.engine, length)
        self._scheduler, self._inbox, self._outbox = made

    def generate(self, prompts: Prompts, new_tokens: int) -> Replies:
        sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        outputs = self._outbox.outputs
        outputs.clear()
        begin = time.perf_counter()
        for number, prompt in enumerate(prompts):
            self._inbox.submit(str(number), prompt, sampling)
        replies: Prompts = [[] for _ in prompts]
        first: list[float | None] = [None] * len(prompts)
        open_requests = len(prompts)
        while open_requests:
            self._scheduler.run_once()
            for output in outputs:
                number = int(output.rid)
                replies[number] += output.token_ids
                if first[number] is None and output.token_ids:
                    first[number] = time.perf_counter() - begin
                open_requests -= output.finish is not None
            outputs.clear()
        return replies, [seconds for seconds in first if seconds is not None]


def talk(
    run: BenchRun,
    side: str,
    generate: Callable[[Prompts, int], Replies],
    args: argparse.Namespace,
    vocab: int,
) -> None:
    """Hold all sessions with one side and record its speed."""
    dice = np.random.default_rng(0)

    def words(count: int) -> list[int]:
        return cast("list[int]", dice.integers(0, vocab, count).tolist())

    # Compiles what this workload needs.
    generate([words(args.prompt) for _ in range(2)], 4)
    histories: Prompts = [words(args.prompt) for _ in range(args.sessions)]
    begin = time.perf_counter()
    produced = 0
    first_tokens: list[list[float]] = []
    for turn in range(args.turns):
        if turn:
            histories = [history + words(args.follow_up) for history in histories]
        replies, seconds = generate(histories, args.reply)
        first_tokens.append(seconds)
        produced += sum(map(len, replies))
        # What was said is part of the next prompt, as a chat's is.
        histories = [history + reply for history, reply in zip(histories, replies, strict=True)]
    elapsed = time.perf_counter() - begin
    wanted = args.sessions * args.turns * args.reply
    times = {
        f"ttft_s_turn_{turn + 1}": statistics.median(seconds)
        for turn, seconds in enumerate(first_tokens)
        if seconds
    }
    run.record(
        "throughput",
        side=side,
        seconds=elapsed,
        output_tokens_per_s=produced / elapsed,
        complete=produced == wanted,
        **times,
    )


def sides(model: ModelArgs, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What to compare: name -> something that loads it."""

    def runtime(tca: str | None, min_confidence: float = 0.0) -> Callable[[], Any]:
        return lambda: Runtime(model, args.sessions, args.chunk, tca, min_confidence)

    found = {"dense": runtime(None), f"tca {args.tca_config}": runtime(args.tca_config)}
    for confidence in args.min_confidence:
        name = f"tca {args.tca_config} min_confidence {confidence:g}"
        found[name] = runtime(args.tca_config, confidence)
    found["transformers"] = lambda: TransformersPeer(model)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Time multi-turn sessions in one process.")
    parser.add_argument("model", help="GGUF file, Hugging Face directory, or name of a shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the first turn")
    parser.add_argument("--follow-up", type=int, default=200, help="tokens of each later turn")
    parser.add_argument("--reply", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--tca-config", default="uniform:0.15,0.39")
    parser.add_argument(
        "--min-confidence",
        type=float,
        nargs="*",
        default=[],
        help="sides that read more where the model is not sure, which random words always make it",
    )
    parser.add_argument("--skip", nargs="*", default=[], help="sides to leave out")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmark/results"))
    args = parser.parse_args()
    model = ModelArgs(model_path=args.model, device=args.device, dtype=args.dtype)
    if args.model in NAMED_CONFIGS:
        model = ModelArgs(
            load_format="dummy", model_config=args.model, device=args.device, dtype=args.dtype
        )
    run = BenchRun(torch.device(args.device), torch.bfloat16, 0.0, False)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    run.record("machine", gpu=gpu, model=Path(args.model).name, **workload(args))
    for name, load in sides(model, args).items():
        if name.split()[0] in args.skip:
            continue
        try:
            side = load()
            talk(run, name, side.generate, args, vocab=256)
        except Exception as error:
            # A peer that cannot run is a line of the table, not the end of it.
            run.record("throughput", side=name, failed=repr(error)[:300])
        side = None
        gc.collect()
        torch.cuda.empty_cache()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / f"throughput_{Path(args.model).name.removesuffix('.gguf')}.json"
    path.write_text(json.dumps(run.results, indent=1))
    print("wrote", path)
    return 0


def workload(args: argparse.Namespace) -> dict[str, int]:
    names = ("sessions", "turns", "prompt", "follow_up", "reply", "chunk")
    return {name: getattr(args, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
