"""Time match, insert and evict in a prefix tree of 100 000 nodes.

Run from the root of the repository: ``python -m benchmark.bench_radix_tree``.

The tree grows like a busy server's: every new sequence continues an earlier one, half of the
time from its middle (which splits a node), with fresh tokens. One run of new tokens is a node.

Each match is timed twice: elapsed, and CPU time of the thread, which leaves out the time slices
that other processes took. The target is for the CPU time, so that a busy machine does not decide.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmark.figures import Figure, all_passed, format_figures, save_figures
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.radix_tree import Namespace, RadixTree

Tokens = NDArray[np.int32]
NAMESPACE = Namespace()
VOCABULARY = 50_000
MAX_TOKENS = 8192


def main(argv: Sequence[str] | None = None) -> int:
    """Build, measure, print; the exit status is 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.bench_radix_tree",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--run", type=int, default=32, help="tokens of a new run")
    parser.add_argument("--rows", type=int, default=8, help="layers x KV heads")
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    tree = RadixTree()
    stored, insert_times = grow(tree, args.nodes, args.run, args.rows, rng)
    match_times, lengths = match(tree, stored, args.queries, rng)
    evicted_slots, evict_seconds = evict(tree, args.nodes // 2)
    tree.check()
    us = 1e6
    median, slow = (np.percentile(match_times, [50, 99], axis=0) * us).tolist()
    figures = [
        Figure(
            "match, median", median[0], "us", detail=f"{np.mean(lengths):.0f} tokens on average"
        ),
        Figure("match, 99th percentile", slow[0], "us", limit=1000.0),
        Figure("match, median elapsed", median[1], "us"),
        Figure("match, 99th percentile elapsed", slow[1], "us"),
        Figure("insert, median", float(np.median(insert_times)) * us, "us", detail="last 10 %"),
        Figure("insert rate", 1 / float(np.mean(insert_times)), "/s"),
        Figure("evict rate", args.nodes // 2 / evict_seconds, "nodes/s"),
        Figure("evict rate, memory", evicted_slots / evict_seconds, "slots/s"),
    ]
    print(format_figures(figures))
    raw = {"sequences": len(stored), "mean_query_tokens": float(np.mean(lengths))}
    print(f"written to {save_figures('radix_tree', vars(args), figures, raw)}")
    return 0 if all_passed(figures) else 1


def grow(
    tree: RadixTree, nodes: int, run: int, rows: int, rng: np.random.Generator
) -> tuple[list[Tokens], list[float]]:
    """Insert until the tree has ``nodes`` nodes; times are of the last tenth."""
    stored = [np.empty(0, np.int32)]
    times: list[float] = []
    next_slot = count = 0
    with tqdm(total=nodes, unit="node") as bar:
        while count < nodes:
            base = stored[int(rng.integers(len(stored)))]
            inside = rng.random() < 0.5
            keep = int(rng.integers(len(base) + 1)) if inside else len(base)
            keep = min(keep, MAX_TOKENS - run)
            tokens = np.concatenate([base[:keep], _fresh(rng, run)])
            matched = tree.match(NAMESPACE, tokens)
            splits = matched.offset < len(matched.node.tokens)
            size = len(tokens) - matched.num_tokens
            slots = torch.arange(next_slot, next_slot + rows * size, dtype=torch.int32)
            next_slot += rows * size
            value = HeadSlots.full(matched.num_tokens, slots.view(rows, size))
            begin = time.perf_counter()
            tree.insert(NAMESPACE, tokens, value)
            seconds = time.perf_counter() - begin
            stored.append(tokens)
            count += 2 if splits else 1
            bar.update(2 if splits else 1)
            if count > 0.9 * nodes:
                times.append(seconds)
    return stored[1:], times


def match(
    tree: RadixTree, stored: Sequence[Tokens], queries: int, rng: np.random.Generator
) -> tuple[list[tuple[float, float]], list[int]]:
    """Match prompts that continue a stored sequence: ((CPU s, elapsed s), prompt length) each."""
    times, lengths = [], []
    for _ in range(queries):
        known = stored[int(rng.integers(len(stored)))]
        prompt = np.concatenate([known, _fresh(rng, 64)])
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        found = tree.match(NAMESPACE, prompt)
        times.append((time.thread_time() - cpu_begin, time.perf_counter() - begin))
        lengths.append(len(prompt))
        if found.num_tokens < len(known):
            raise AssertionError(f"{found.num_tokens} of {len(known)} stored tokens were found")
    return times, lengths


def evict(tree: RadixTree, nodes: int) -> tuple[int, float]:
    """Take out ``nodes`` least recently used leaves: (slots, seconds)."""
    slots = 0
    begin = time.perf_counter()
    for _ in range(nodes):
        leaf = tree.leaves.pop()
        if leaf is None:
            raise AssertionError("the tree ran out of leaves before its nodes were gone")
        tree.remove(leaf)
        slots += leaf.slots.num_slots
    return slots, time.perf_counter() - begin


def _fresh(rng: np.random.Generator, count: int) -> Tokens:
    return rng.integers(VOCABULARY, size=count, dtype=np.int32)


if __name__ == "__main__":
    sys.exit(main())
