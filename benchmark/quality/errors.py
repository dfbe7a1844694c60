"""``errors``: what dropped tokens do to attention, layer by layer, and how it adds up.

The last queries of prompts are computed twice over the same cache: with everything, and with the
decode view. Per layer: the error of the attention's output for the same queries, beside the two
bounds of the certificate, ``2 g max|V|`` and ``g diam(V)``, g being the dropped attention mass;
and how far the residual stream is from full attention's after that layer.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark.quality import lab, samples
from benchmark.quality.configurations import Configuration
from benchmark.quality.lab import Ask, Lab
from benchmark.quality.progress import bar
from benchmark.quality.samples import Sample
from tca_runtime.cache.radix_tree import Namespace
from tca_runtime.config import ModelArgs
from tca_runtime.engine.engine import Engine
from tca_runtime.sparsity.policies import Candidates
from tca_runtime.sparsity.settings import SparsitySettings
from tca_runtime.tokenizer.loading import load_tokenizer

# Values whose pairwise distances are looked at for the diameter.
DIAMETER_SAMPLE = 2048

# Attention mass below which an error is not compared with its bound.
LEAST_DROPPED = 1e-4


@dataclass
class Certified:
    """One layer's figures, means over KV heads and queries: all relative to ``|att|``."""

    dropped_mass: float
    error: float
    theorem: float
    diameter: float
    worst_ratio: float


@dataclass
class TailAttention:
    """Attention of a prompt's last tokens over the cache, one layer after the other.

    Attributes
    ----------
    settings : None for full attention; else each layer's view is chosen by these queries
    outputs : the layers' attention outputs, in order
    """

    engine: Engine
    slots: Tensor
    settings: SparsitySettings | None = None
    outputs: list[Tensor] = field(default_factory=list)
    certified: list[Certified] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = self.engine.shape
        rows = slice(layer * shape.num_kv_heads, (layer + 1) * shape.num_kv_heads)
        tail = len(q)
        past = self.slots[rows, : self.slots.shape[1] - tail].long()
        pool = self.engine.cache.pool.kv
        keys = torch.cat([pool[past, 0], k.transpose(0, 1)], dim=1).float()
        values = torch.cat([pool[past, 1], v.transpose(0, 1)], dim=1).float()
        queries = q.view(tail, shape.num_kv_heads, shape.group, -1).float()
        logits = torch.einsum("phgd,hnd->hgpn", queries, keys) * shape.scale
        total = keys.shape[1]
        causal = torch.ones(tail, total, dtype=torch.bool, device=q.device).tril(total - tail)
        logits = logits.masked_fill(~causal, -torch.inf)
        weights = logits.softmax(-1)
        if self.settings is not None:
            keep = self._keep(layer, q, weights, past)
            full = weights @ values[:, None]
            kept = logits.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
            sparse = kept @ values[:, None]
            self.certified.append(certify(weights, keep, values, full, sparse))
            attended = sparse
        else:
            attended = weights @ values[:, None]
        out = attended.permute(2, 0, 1, 3).reshape(tail, -1, shape.head_dim).to(q.dtype)
        self.outputs.append(out)
        return out.reshape(tail, -1)

    def _keep(self, layer: int, q: Tensor, weights: Tensor, past: Tensor) -> Tensor:
        settings, shape = self.settings, self.engine.shape
        assert settings is not None
        heads, total = weights.shape[0], weights.shape[-1]
        count = settings.num_candidates(total)
        keep = torch.ones(heads, total, dtype=torch.bool, device=q.device)
        if not count:
            return keep
        candidates = Candidates(
            importance=weights.mean((1, 2))[:, :count],
            probes=q,
            block=settings.block,
            scale=shape.scale,
            pool=self.engine.cache.pool.kv,
            slots=past[:, :count],
        )
        counts = settings.decode.level_counts(count // settings.block)
        kept = settings.decode.kept_tokens(count // settings.block)
        keep[:, :count] = settings.policy.choose(candidates, counts[layer], kept[layer])
        return keep


def certify(
    weights: Tensor, keep: Tensor, values: Tensor, full: Tensor, sparse: Tensor
) -> Certified:
    """Errors of one layer beside their bounds.

    Parameters
    ----------
    weights : ``[Hkv, G, P, n]`` of full attention
    keep : bool ``[Hkv, n]``
    values : ``[Hkv, n, D]``
    full, sparse : ``[Hkv, G, P, D]``
    """
    size = full.norm(dim=-1).clamp_min(1e-12)
    dropped = (weights * ~keep[:, None, None]).sum(-1)
    error = (full - sparse).norm(dim=-1)
    largest = values.norm(dim=-1).amax(1)[:, None, None]
    step = -(-values.shape[1] // DIAMETER_SAMPLE)
    some = values[:, ::step]
    diameter = torch.cdist(some, some).amax((1, 2))[:, None, None]
    theorem = 2 * dropped * largest
    # Where next to nothing is dropped, rounding is larger than the bound.
    used = dropped > LEAST_DROPPED
    return Certified(
        dropped_mass=float(dropped.mean()),
        error=float((error / size).mean()),
        theorem=float((theorem / size).mean()),
        diameter=float((dropped * diameter / size).mean()),
        worst_ratio=float((error[used] / theorem[used]).max()) if bool(used.any()) else 0.0,
    )


def measure(engine: Engine, ids: list[int], settings: SparsitySettings) -> list[dict[str, float]]:
    """Figures of every layer for a prompt that is cached whole."""
    tokens = np.asarray(ids, dtype=np.int32)
    match = engine.cache.match(Namespace("", prunable=False), tokens)
    assert match.num_tokens == len(ids)
    handle = engine.cache.tree.lock(match)
    parts = [node.slots for node in engine.cache.tree.path(handle)]
    rows = engine.shape.rows
    slots = torch.cat([part.slots.view(rows, -1) for part in parts], dim=1)[:, : len(ids)]
    tail = min(settings.probes, len(ids))
    inputs = torch.tensor(ids[-tail:], device=engine.device)
    positions = torch.arange(len(ids) - tail, len(ids), device=engine.device)

    def run(attention: Callable[..., Tensor]) -> None:
        with torch.inference_mode():
            engine.model.forward(inputs, positions, attention)

    exact = TailAttention(engine, slots)
    sparse = TailAttention(engine, slots, settings)
    run(exact)
    run(sparse)
    engine.cache.tree.unlock(handle)
    found = []
    for one, two, layer in zip(exact.outputs, sparse.outputs, sparse.certified, strict=True):
        away = (one.float() - two.float()).norm(dim=-1) / one.float().norm(dim=-1).clamp_min(1e-12)
        found.append({**vars(layer), "accumulated": float(away.mean())})
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--data", type=Path, required=True, help="a file of RULER prompts")
    parser.add_argument("--limit", type=int, default=13, help="prompts")
    parser.add_argument("--configurations", nargs="+", default=["tca p100 k39", "tca p100 k25"])
    parser.add_argument("--output", type=Path, required=True, help="a .json file")


def run(args: argparse.Namespace) -> None:
    """Write the mean of every figure per configuration and layer."""
    tokenizer: Any = load_tokenizer(ModelArgs(model_path=args.model))
    data = samples.read(args.data, Sample)[: args.limit]
    length = max(sample.length for sample in data)
    made = Lab(lab.load(args.model, args.device), tokens=2 * length)
    made.use(Configuration.parse("full"))
    sums: dict[str, list[dict[str, float]]] = {}
    progress = bar(len(data), "prompts")
    shape = made.engine.shape
    for sample in data:
        ids = tokenizer.backend_tokenizer.encode(sample.text).ids
        made.generate([Ask(sample.id, ids, 0)])
        for name in args.configurations:
            wanted = Configuration.parse(name).at_length(length)
            settings = wanted.settings(shape.num_layers, shape.num_kv_heads)
            if settings is None:
                raise SystemExit(f"{name!r} drops nothing")
            layers = sums.setdefault(name, [defaultdict(float) for _ in range(shape.num_layers)])
            for total, figures in zip(layers, measure(made.engine, ids, settings), strict=True):
                for key, value in figures.items():
                    total[key] = (
                        max(total[key], value)
                        if key == "worst_ratio"
                        else total[key] + value / len(data)
                    )
        made.flush()
        progress.update()
    progress.close()
    report = {
        "model": Path(args.model).name,
        "data": args.data.name.removesuffix(".jsonl.xz"),
        "prompts": len(data),
        "configurations": {
            name: [{k: float(f"{v:.5g}") for k, v in layer.items()} for layer in layers]
            for name, layers in sums.items()
        },
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, layers in report["configurations"].items():
        print(name)
        for number, layer in enumerate(layers):
            print(f"  {number:3d} ", " ".join(f"{k}={v:.4g}" for k, v in layer.items()))
