"""Whether a prefix that went to the host tier and back is the one that left.

    PYTHONPATH=kernels:python:. python benchmark/gpu/check_host_tier.py --books DIR

Documents with two questions each, in the order of ``bench_needles``' pressure experiment: a server
whose pool holds two of them beside one that holds them all. Both must select the same and answer
the same; where they do not, the script says whether the K and V of the document changed since they
were first seen, in which node and tier.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark import bench_needles
from benchmark.in_process import InProcessServer
from tca_runtime.cache.radix_tree import RadixNode

# A document is known by these tokens: those before are the chat template's.
MARK = slice(60, 90)


def main() -> int:
    """Compare, print; the exit status is 1 if a document came back different."""
    args = _parse()
    bench = bench_needles.Bench(args)
    roomy = bench.server(len(bench.documents) + 1.0)
    tight = bench.server(args.pool, host_gib=args.host_gib)
    memory = Memory(bench)
    different = 0
    begin = time.monotonic()
    for number in range(len(bench.documents) + 1):
        if time.monotonic() - begin > args.max_seconds:
            break
        if number < len(bench.documents):
            for server in (tight, roomy):
                bench_needles.ask(server, bench, number, 0, True)
            memory.check(tight, f"after question 0 on {number}")
        if number:
            mine, theirs = (
                bench_needles.ask(server, bench, number - 1, 1, True) for server in (tight, roomy)
            )
            memory.check(tight, f"after question 1 on {number - 1}")
            same = mine.token_ids == theirs.token_ids and _alike(mine.tca, theirs.tca)
            different += not same
            retracted = tight.scheduler.planner.num_retractions
            print(number - 1, "same" if same else f"DIFFERENT {mine.tca} {theirs.tca}", retracted)
    print(tight.engine.cache.reclaimer.counts)
    print(f"{different} answers differ, {memory.changed} slots changed")
    return 1 if different or memory.changed else 0


def _alike(mine: dict[str, Any] | None, theirs: dict[str, Any] | None) -> bool:
    """The same report; masses are sums whose order may differ."""
    if mine is None or theirs is None:
        return mine is theirs
    masses = mine["dropped_mass"], theirs["dropped_mass"]
    return mine | {"dropped_mass": 0} == theirs | {"dropped_mass": 0} and math.isclose(
        *masses, rel_tol=1e-5
    )


class Memory:
    """What every slot of every document held when it was first seen."""

    def __init__(self, bench: bench_needles.Bench) -> None:
        self._documents = {tuple(d.prompts[0][MARK]): i for i, d in enumerate(bench.documents)}
        self._common = [_common(*d.prompts) for d in bench.documents]
        self._seen: dict[int, NDArray[np.int64]] = {}
        self.changed = 0

    def check(self, server: InProcessServer, when: str) -> None:
        """Compare all that the server holds with what was seen before."""
        cache = server.engine.cache
        for number, node in self._nodes(cache.tree.namespaces().values()):
            for tier, part, pool in (
                ("device", node.slots, cache.pool),
                ("host", node.host, cache.reclaimer.host),
            ):
                if part is None or pool is None or not part.num_slots:
                    continue
                rows = np.repeat(np.arange(len(part.lengths)), part.lengths)
                positions = part.positions.cpu().numpy()
                inside = positions < self._common[number]
                place = rows[inside], positions[inside]
                found = _digests(pool.kv, part.slots)[inside]
                shape = (len(part.lengths), self._common[number])
                seen = self._seen.setdefault(number, np.zeros(shape, np.int64))
                old = seen[place]
                wrong = int(((old != 0) & (old != found)).sum())
                seen[place] = found
                if wrong:
                    self.changed += wrong
                    span = f"[{node.slots.begin}, {node.slots.end})"
                    print(
                        f"{when}: {wrong} of {len(found)} slots of {number} changed, {tier} {span}"
                    )

    def _nodes(self, roots: Any) -> Iterator[tuple[int, RadixNode]]:
        stack = [(root, [*root.tokens.tolist()]) for root in roots]
        while stack:
            node, path = stack.pop()
            number = self._documents.get(tuple(path[MARK]))
            if number is not None:
                yield number, node
            stack += [(child, path + child.tokens.tolist()) for child in node.children.values()]


def _digests(kv: torch.Tensor, slots: torch.Tensor) -> NDArray[np.int64]:
    """A number for what each slot holds: int64 ``[n]``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = kv[slots.long().to(kv.device)].to(device).flatten(1)
    bits = rows.view(torch.int16 if rows.element_size() == 2 else torch.int32).int()
    weights = torch.arange(1, bits.shape[1] + 1, device=device, dtype=torch.int32)
    return (bits * weights).sum(1).long().cpu().numpy()


def _common(left: list[int], right: list[int]) -> int:
    return next(i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    bench_needles.add_options(parser)
    parser.add_argument(
        "--max-seconds", type=float, default=60.0, help="start no further document after this"
    )
    # A document has one question after the first here.
    parser.set_defaults(
        documents=36, questions=1, tca_config="uniform:0.15,0.28", chunked_prefill_size=8192
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
