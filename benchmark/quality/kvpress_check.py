"""``kvpress``: policies here beside the same methods in NVIDIA's kvpress, on the same attention.

kvpress is downloaded and its presses are imported without the rest of the package, which needs an
older transformers. For random queries, keys and values both sides score the same candidates; the
check is how many of the kept tokens are the same.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark.quality import sources
from tca_kernels.score import probe_scores
from tca_runtime.sparsity.policies import Candidates, create_policy

KVPRESS = "kvpress==0.5.5"
# kvpress observes a window of 64 queries and keeps it; so do 64 probes and a window of 64.
WINDOW, BLOCK = 64, 64


@dataclass(frozen=True)
class Case:
    """Random attention of one layer: queries ``[P, Hq, D]``, keys and values ``[Hkv, n, D]``."""

    queries: Tensor
    keys: Tensor
    values: Tensor

    @staticmethod
    def random(
        seed: int, heads: int = 2, group: int = 7, dim: int = 64, tokens: int = 2112
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        # Keys of real models have a common direction; without it KeyDiff has nothing to find.
        common = torch.randn(heads, 1, dim, generator=generator)
        keys = torch.randn(heads, tokens, dim, generator=generator) + common
        values = torch.randn(heads, tokens, dim, generator=generator)
        return Case(torch.randn(WINDOW, heads * group, dim, generator=generator) * 2, keys, values)

    @property
    def num_candidates(self) -> int:
        return self.keys.shape[1] - WINDOW

    def ours(self, policy: str, kept: int) -> Tensor:
        """What the policy keeps of the candidates: bool ``[Hkv, n - WINDOW]``."""
        heads, tokens, dim = self.keys.shape
        pool = torch.stack([self.keys, self.values], dim=2).reshape(heads * tokens, 2, dim)
        slots = torch.arange(heads * tokens, dtype=torch.int32)
        starts = torch.arange(heads)[None] * tokens
        lengths = torch.full((1, heads), tokens)
        scores = probe_scores(self.queries[None], pool, slots, starts, lengths, lengths, dim**-0.5)
        inside = slots.view(heads, tokens)[:, : self.num_candidates].long()
        candidates = Candidates(
            scores.view(heads, tokens)[:, : self.num_candidates],
            self.queries,
            BLOCK,
            dim**-0.5,
            pool,
            inside,
        )
        counts = np.zeros((heads, 7), dtype=np.int64)
        return create_policy(policy).choose(candidates, counts, np.full(heads, kept))

    def theirs(self, press: Any, kept: int) -> Tensor:
        """What kvpress keeps of them, by its score of the whole sequence."""
        heads, tokens, dim = self.keys.shape
        group = self.queries.shape[1] // heads
        queries = self.queries.view(WINDOW, heads, group, dim)
        logits = torch.einsum("phgd,hnd->hgpn", queries, self.keys) * dim**-0.5
        causal = torch.ones(WINDOW, tokens, dtype=torch.bool).tril(tokens - WINDOW)
        weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        attentions = weights.reshape(1, heads * group, WINDOW, tokens)
        config = types.SimpleNamespace(num_attention_heads=heads * group, num_key_value_heads=heads)
        module = types.SimpleNamespace(config=config, head_dim=dim)
        hidden = torch.empty(1, tokens, 1)
        score = press.score(module, hidden, self.keys[None], self.values[None], attentions, {})
        best = score[0, :, : self.num_candidates].topk(kept, dim=-1).indices
        chosen = torch.zeros(heads, self.num_candidates, dtype=torch.bool)
        return chosen.scatter_(1, best, True)


def presses() -> dict[str, Any]:
    """kvpress' counterparts of policies, by the policies' names."""
    (init,) = sources.python_package(KVPRESS, r"kvpress/__init__\.py")
    for name in ("kvpress", "kvpress.presses"):
        package = types.ModuleType(name)
        package.__path__ = [str(init.parent.parent / name.replace(".", "/"))]
        sys.modules[name] = package
    snapkv = importlib.import_module("kvpress.presses.snapkv_press")
    keydiff = importlib.import_module("kvpress.presses.keydiff_press")
    return {
        "snapkv": snapkv.SnapKVPress(window_size=WINDOW, kernel_size=5),
        "keydiff": keydiff.KeyDiffPress(),
    }


def agreement(case: Case, policy: str, press: Any, ratios: Sequence[float]) -> list[float]:
    """Share of the kept tokens that both keep, for each kept ratio."""
    found = []
    for ratio in ratios:
        kept = int(case.num_candidates * ratio)
        both = case.ours(policy, kept) & case.theirs(press, kept)
        found.append(float(both.sum()) / (kept * len(case.keys)))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.25, 0.39, 0.5])


def run(args: argparse.Namespace) -> None:
    """Print the agreement per policy and ratio."""
    for policy, press in presses().items():
        rows = [
            agreement(Case.random(seed), policy, press, args.ratios) for seed in range(args.cases)
        ]
        means = np.mean(rows, axis=0)
        cells = (f"{r:.0%} kept: {m:.2%}" for r, m in zip(args.ratios, means, strict=True))
        print(f"{policy:8s} same tokens at", ", ".join(cells))
