"""Time the CPU attention backend alone: decode bandwidth, launch cost, prefill, compilation.

Run from the root of the repository: ``python -m benchmark.bench_attention_cpu``.

Every case runs layer after layer over a pool of more than ``--pool-mb``, several rounds; its time
is the sum of each layer's fastest round, so that a busy machine distorts it little. Decode
figures count the bytes of the listed slots. Reading memory (a sum) and copying it (bytes in both
directions) are measured the same way in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.figures import Figure, all_passed, format_figures, save_figures
from tca_runtime.attention import create_backend
from tca_runtime.attention.base import AttentionShape, AttentionStep, PrefillChunk, SlotLists

MODEL_LAYERS = 30
READ_SHARE = 0.6
"""Target: decode reads scattered or contiguous slots at this share of a plain read's speed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status is 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.bench_attention_cpu",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--q-heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pool-mb", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--backend", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        figures = [*_compile_figures(args.head_dim), *_decode_figures(args)]
        figures += [*_launch_figures(args), *_prefill_figures(args)]
    print(format_figures(figures))
    print(f"written to {save_figures('attention_cpu', vars(args), figures, {})}")
    return 0 if all_passed(figures) else 1


def seconds(calls: Sequence[Callable[[], object]], rounds: int) -> float:
    """Sum over ``calls`` of each one's fastest round."""
    fastest = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            fastest[i] = min(fastest[i], time.perf_counter() - begin)
    return sum(fastest)


Order = Literal["contiguous", "40 % kept", "shuffled"]


class Bench:
    """A backend and a pool in which every (request, layer, head) lists ``length`` slots."""

    def __init__(
        self, args: argparse.Namespace, layers: int, lengths: Tensor, order: Order
    ) -> None:
        """``lengths``: ``[B, Hkv]``, the same in every layer."""
        self.shape = AttentionShape(
            num_layers=layers,
            num_q_heads=args.q_heads,
            num_kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        # Layer after layer, as a pool fills that serves one request at a time.
        length = lengths.expand(layers, -1, -1).contiguous()
        start = (length.flatten().cumsum(0) - length.flatten()).view(length.shape)
        listed = int(length.sum())
        slots = int(listed / 0.4) if order == "40 % kept" else listed
        arena = torch.randperm(slots)[:listed].int()
        if order != "shuffled":
            arena = arena.sort().values
        self.lists = SlotLists(arena, start.transpose(0, 1), length.transpose(0, 1).int())
        kv = torch.empty(slots, 2, args.head_dim)
        self.backend = create_backend(args.backend, self.shape, kv)
        kv.normal_()

    def calls(self, tokens: int, uniform: bool) -> list[Callable[[], Tensor]]:
        """One step's layers: a decode step if ``tokens`` is 1, else one chunk of one request."""
        shape = self.shape
        batch = len(self.lists.start)
        total = batch if tokens == 1 else tokens
        ends = (self.lists.start + self.lists.length).transpose(0, 1)
        new = ends[:, :1, :] - torch.arange(tokens, 0, -1)[:, None] if tokens > 1 else ends - 1
        length = int(self.lists.length.max())
        chunk = PrefillChunk(0, tokens, length - tokens, 0, length if uniform else None)
        step = AttentionStep(
            num_decode=batch if tokens == 1 else 0,
            decode=self.lists if tokens == 1 else None,
            chunks=[] if tokens == 1 else [chunk],
            prefill=None if tokens == 1 else self.lists,
            new_slots=self.lists.arena[new],
        )
        q = torch.randn(total, shape.num_q_heads, shape.head_dim)
        k, v = torch.randn(2, total, shape.num_kv_heads, shape.head_dim)
        attend = self.backend.begin(step)
        return [partial(attend, layer, q, k, v) for layer in range(shape.num_layers)]


def _decode_figures(args: argparse.Namespace) -> list[Figure]:
    chunks = torch.ones(args.pool_mb // 8, 8 << 18)
    target = torch.empty_like(chunks)
    size = chunks.numel() * chunks.element_size() / 1e9
    read = size / seconds([chunk.sum for chunk in chunks], args.rounds)
    copies = [partial(to.copy_, chunk) for to, chunk in zip(target, chunks, strict=True)]
    copy = 2 * size / seconds(copies, args.rounds)
    del chunks, target
    figures = [Figure("memory read", read, "GB/s"), Figure("memory copy", copy, "GB/s")]
    for batch, length, order in itertools.product((1, 8), (1024, 8192), get_args(Order)):
        layer_bytes = batch * args.kv_heads * length * 2 * args.head_dim * 4
        layers = max(2, -(-args.pool_mb * 2**20 // layer_bytes))
        lengths = torch.full((batch, args.kv_heads), length)
        bench = Bench(args, layers, lengths, order)
        spent = seconds(bench.calls(1, uniform=True), args.rounds)
        figures.append(
            Figure(
                f"decode {batch} x {length}, {order}",
                layers * layer_bytes / spent / 1e9,
                "GB/s",
                "at least",
                READ_SHARE * read if length == 8192 and order == "contiguous" else None,
                f"{spent / layers * 1e6:.0f} us per layer",
            )
        )
    return figures


def _launch_figures(args: argparse.Namespace) -> list[Figure]:
    """Short lists, alone and between linear layers, whose thread pool is another one."""
    bench = Bench(args, MODEL_LAYERS, torch.full((1, args.kv_heads), 16), "contiguous")
    rounds = 20 * args.rounds
    launch = seconds(bench.calls(1, uniform=True), rounds) / MODEL_LAYERS
    figures = [Figure("decode launch, 16 tokens", launch * 1e6, "us per layer", "at most", 40.0)]
    hidden = args.q_heads * args.head_dim
    x, weight = torch.randn(1, hidden), torch.randn(4 * hidden, hidden)

    def linear() -> Tensor:
        return F.linear(x, weight)

    alone = seconds([linear] * MODEL_LAYERS, rounds) / MODEL_LAYERS
    for length in (16, 1024):
        bench = Bench(args, MODEL_LAYERS, torch.full((1, args.kv_heads), length), "contiguous")
        calls = bench.calls(1, uniform=True)
        attend = seconds(calls, rounds) / MODEL_LAYERS
        both = [partial(_one_after_the_other, linear, call) for call in calls]
        together = seconds(both, rounds) / MODEL_LAYERS
        detail = f"attention alone {attend * 1e6:.0f}, linear alone {alone * 1e6:.0f}"
        name = f"linear + decode, {length} tokens"
        figures.append(Figure(name, together * 1e6, "us per layer", detail=detail))
    return figures


def _one_after_the_other(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> None:
    first()
    second()


def _prefill_figures(args: argparse.Namespace) -> list[Figure]:
    matrix = torch.randn(2048, 2048)
    peak = 2 * 2048**3 / seconds([lambda: matrix @ matrix], 4 * args.rounds) / 1e9
    figures = [Figure("matmul 2048^3", peak, "GFLOP/s")]
    heads = args.kv_heads
    kept = torch.linspace(0.2, 0.6, heads) if heads > 1 else torch.tensor([0.4])
    cases = {
        "prompt of 2048": (2048, torch.zeros(heads)),
        "prompt of 512": (512, torch.zeros(heads)),
        "512 after 7680": (512, torch.full((heads,), 7680.0)),
        "512 after 7680, ragged 40 % kept": (512, 7680 * kept),
        "16 after 7680": (16, torch.full((heads,), 7680.0)),
    }
    layers = 4
    for name, (tokens, past) in cases.items():
        lengths = (past.long() + tokens)[None]
        bench = Bench(args, layers, lengths, "shuffled")
        calls = bench.calls(tokens, uniform=bool((lengths == lengths[0, 0]).all()))
        spent = seconds(calls, args.rounds) / layers
        group = args.q_heads // heads
        pairs = int((past.long() * tokens).sum()) + heads * tokens * (tokens + 1) // 2
        rate = 4 * args.head_dim * group * pairs / spent / 1e9
        total = spent * MODEL_LAYERS
        limit = 1.0 if name == "prompt of 2048" else None
        detail = f"{spent * 1e3:.2f} ms per layer, {rate:.0f} GFLOP/s"
        figures.append(Figure(f"prefill {name}, 30 layers", total, "s", "at most", limit, detail))
    return figures


def _compile_figures(head_dim: int) -> list[Figure]:
    """Seconds to get the kernels in a fresh process, with an empty and a filled cache."""
    code = (
        "import time; from tca_kernels.cpu.decode import decode_kernel;"
        "from tca_kernels.cpu.write import write_kernel; begin = time.perf_counter();"
        f"decode_kernel({head_dim}); write_kernel(); print(time.perf_counter() - begin)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        command = [sys.executable, "-c", code]
        cold, cached = (
            float(subprocess.check_output(command, env=environment, text=True)) for _ in range(2)
        )
    return [Figure("compilation", cold, "s"), Figure("load from numba's cache", cached, "s")]


if __name__ == "__main__":
    sys.exit(main())
