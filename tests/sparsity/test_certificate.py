"""The error certificate on a real model: what dropping costs never exceeds what is reported.

For kept set S and dropped attention mass g of a query, ``|att - att_S| <= 2 g max|V|`` and
``<= g diam(V)``. What replies report is the mean of g over probes, layers and heads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmark.teacher_forcing import Prompt, TeacherForcing
from tca_runtime.attention.base import HeadLists, ViewChooser
from tca_runtime.cache.radix_tree import Tokens
from tca_runtime.cache.sequence import Sequence
from tca_runtime.calibration.options import DEFAULT_DATA
from tca_runtime.config import ModelArgs
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.settings import SparsitySettings
from tca_runtime.tokenizer.loading import load_tokenizer

pytestmark = pytest.mark.slow

MODEL = ModelArgs(device="cpu")
TOKENS, FOLLOWING, CHUNK, PROBES = 1600, 8, 512, 16


@dataclass(frozen=True)
class Errors:
    """One layer: float64 ``[Hkv, queries, group]`` each, and per KV head what V can do."""

    dropped: Tensor
    error: Tensor
    largest: Tensor
    diameter: Tensor

    @staticmethod
    def measure(q: Tensor, keys: Tensor, values: Tensor, keep: Tensor, scale: float) -> Errors:
        """``q [n, Hq, D]`` are the last n tokens of ``keys``, ``values [Hkv, T, D]``."""
        heads, length, dim = keys.shape
        rows = q.double().view(len(q), heads, -1, dim).permute(1, 0, 2, 3)
        logits = torch.einsum("hngd,htd->hngt", rows, keys.double()) * scale
        future = torch.ones(len(q), length, dtype=torch.bool).triu(length - len(q) + 1)
        logits.masked_fill_(future[:, None], -torch.inf)
        weights = logits.softmax(-1)
        sparse = logits.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
        moved = (weights - sparse) @ values.double()[:, None]
        return Errors(
            (weights * ~keep[:, None, None]).sum(-1),
            moved.norm(dim=-1),
            values.norm(dim=-1).amax(-1).double(),
            torch.cdist(values, values).amax((1, 2)).double(),
        )


@dataclass
class Recorder:
    """Passes a chooser's views on and keeps them, with the latest queries of every layer."""

    chooser: ViewChooser
    queries: list[Tensor] = field(default_factory=list)
    views: list[HeadLists | None] = field(default_factory=list)

    def __call__(self, layer: int, chunk: int, q: Tensor) -> HeadLists | None:
        self.queries.append(q[-PROBES:].clone())
        self.views.append(self.chooser(layer, chunk, q))
        return self.views[-1]


class RecordedForcing(TeacherForcing):
    """Keeps what the latest forward pass chose and for which queries."""

    recorder: Recorder

    def _forward(
        self,
        sequence: Sequence,
        slots: Tensor,
        tokens: Tokens,
        begin: int,
        choose: ViewChooser | None,
    ) -> Tensor:
        assert choose is not None
        self.recorder = Recorder(choose)
        return super()._forward(sequence, slots, tokens, begin, self.recorder)

    def errors(self, prompt: Prompt, length: int, keep: Tensor) -> list[Errors]:
        """Of the recorded queries, the last of ``length`` tokens; ``keep [L, Hkv, length]``."""
        shape, kv = self.engine.shape, self.engine.cache.pool.kv
        parts = self.engine.cache.parts(prompt.sequence)
        slots = torch.cat([part.dense() for part in parts], dim=1)[:, :length].long()
        found = []
        for layer, rows in enumerate(slots.split(shape.num_kv_heads)):
            keys, values = kv[rows].unbind(2)
            q = self.recorder.queries[layer]
            found.append(Errors.measure(q, keys, values, keep[layer], shape.scale))
        return found

    def kept_by_views(self, prompt: Prompt, own: int) -> Tensor:
        """What the recorded views list, and the chunk's ``own`` tokens: bool ``[L, Hkv, T]``."""
        shape = self.engine.shape
        parts = self.engine.cache.parts(prompt.sequence)
        slots = torch.cat([part.dense() for part in parts], dim=1)[:, : prompt.num_tokens].long()
        listed = torch.zeros(len(self.engine.cache.pool.kv), dtype=torch.bool)
        for view in self.recorder.views:
            assert view is not None
            listed[view.slots.long()] = True
        keep = listed[slots]
        keep[:, -own:] = True
        return keep.view(shape.num_layers, shape.num_kv_heads, -1)


@pytest.fixture(scope="module")
def forcing() -> RecordedForcing:
    return RecordedForcing(MODEL, TOKENS + 64)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    text = json.loads((DEFAULT_DATA / "retrieval.jsonl").read_text().splitlines()[0])["text"]
    ids = load_tokenizer(MODEL).encode(text)
    return np.array(ids[-TOKENS - FOLLOWING :], dtype=np.int32)


def settings(forcing: TeacherForcing, ratio: float) -> SparsitySettings:
    shape = forcing.engine.shape
    table = BudgetTable.uniform(ratio, shape.num_layers, shape.num_kv_heads)
    return SparsitySettings(
        TCAPolicy(),
        table,
        table,
        window=128,
        probes=PROBES,
        min_candidates=128,
        granularity=CHUNK,
    )


def check(found: list[Errors]) -> float:
    """Both bounds for every layer, head and query; returns the mean dropped mass."""
    tightest = 0.0
    for layer in found:
        largest, diameter = (x[:, None, None] for x in (layer.largest, layer.diameter))
        # Keys and values are float32.
        slack = 1e-5 * largest
        assert (layer.error <= 2 * layer.dropped * largest + slack).all()
        assert (layer.error <= layer.dropped * diameter + slack).all()
        tightest = max(tightest, float((layer.error / (layer.dropped * diameter + slack)).max()))
    # A bound that nothing comes near would prove little, and nothing dropped proves nothing.
    assert tightest > 0.2
    dropped = torch.stack([layer.dropped for layer in found])
    assert dropped.max() > 0.05
    return float(dropped.mean())


@pytest.mark.parametrize("ratio", [0.05, 0.25])
def test_bounds_hold_in_every_layer_and_head(
    forcing: RecordedForcing, tokens: Tokens, ratio: float
) -> None:
    wanted = settings(forcing, ratio)
    prompt = forcing.prefill(tokens[:TOKENS], FOLLOWING, wanted)
    layers = forcing.engine.shape.num_layers
    assert len(forcing.recorder.queries) == layers

    own = TOKENS % CHUNK
    keep = forcing.kept_by_views(prompt, own)
    assert 0 < keep.float().mean() < 0.7
    check(forcing.errors(prompt, TOKENS, keep))

    view = prompt.decode_view(wanted.decode)
    assert view is not None and prompt.work is not None
    keep = torch.isin(prompt.work.lists.slots, view.slots).view(keep.shape)
    of_probes = check(forcing.errors(prompt, TOKENS, keep))
    # Replies report just this.
    assert float(view.dropped_mass) == pytest.approx(of_probes, rel=1e-3)

    forcing.log_probs(prompt, tokens[TOKENS:], view)
    later = torch.nn.functional.pad(keep, (0, FOLLOWING), value=True)
    check(forcing.errors(prompt, TOKENS + FOLLOWING, later))
    forcing.release(prompt)
