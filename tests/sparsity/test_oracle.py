"""For every policy: attention over views equals dense attention under the equivalent mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from tca_runtime.attention.base import (
    AttentionBackend,
    AttentionShape,
    AttentionStep,
    HeadLists,
    PrefillChunk,
)
from tca_runtime.attention.registry import create_backend
from tca_runtime.attention.triton_backend import TritonBackend
from tca_runtime.cache.manager import CacheManager
from tca_runtime.cache.radix_tree import Namespace
from tca_runtime.cache.sequence import Sequence
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.cache.views import ViewTable
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.chooser import ChunkSelection, RequestSparsity, StepSelection
from tca_runtime.sparsity.policies import POLICIES, create_policy
from tca_runtime.sparsity.settings import SparsitySettings

CPU = torch.device("cpu")
LAYERS, HEADS, DIM, BLOCK, WINDOW = 2, 2, 16, 8, 20


@dataclass
class Recorder:
    """Passes a chooser's views on and notes which positions they list."""

    selection: StepSelection
    position_of: dict[int, int]
    seen: list[list[set[int]] | None] = field(default_factory=list)

    def __call__(self, layer: int, chunk: int, q: Tensor) -> HeadLists | None:
        view = self.selection(layer, chunk, q)
        positions = None
        if view is not None:
            positions = [{self.position_of[int(s)] for s in head} for head in view.per_head()]
            for head, kept in zip(view.per_head(), positions, strict=True):
                assert [self.position_of[int(s)] for s in head] == sorted(kept)
        self.seen.append(positions)
        return view


class Model:
    """Random queries, keys and values per layer, and a cache that serves them."""

    def __init__(self, group: int, policy: str, ratio: float, backend: str, tokens: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.shape = AttentionShape(LAYERS, HEADS * group, HEADS, DIM, torch.float32, CPU)
        self.q = torch.randn(LAYERS, tokens, HEADS * group, DIM, generator=generator) * 2
        self.k, self.v = torch.randn(2, LAYERS, tokens, HEADS, DIM, generator=generator)
        pool = SlotPool(4 * tokens * LAYERS * HEADS + 1, DIM, torch.float32, CPU)
        views = ViewTable(4, LAYERS, HEADS, 40 * (tokens + 600), CPU)
        self.cache = CacheManager(pool, views)
        self.backend: AttentionBackend
        if backend == "cuda":
            # Its layout of the work, with the kernels' references.
            self.backend = TritonBackend(self.shape, pool.kv)
        else:
            self.backend = create_backend(backend, self.shape, pool.kv)
        table = BudgetTable.uniform(ratio, LAYERS, HEADS, BLOCK)
        self.sparsity = RequestSparsity(
            SparsitySettings(
                create_policy(policy), table, table, WINDOW, probes=4, min_candidates=BLOCK
            )
        )

    def prefill(self, sequence: Sequence, size: int) -> None:
        """Compute the next ``size`` tokens and compare each layer with the masked oracle."""
        begin = sequence.computed
        slots = self.cache.extend(sequence, size)
        parts = self.cache.parts(sequence)
        last = begin + size == self.q.shape[1]
        work = ChunkSelection.plan(self.sparsity, parts, size, last)
        position_of = {
            int(s): int(p)
            for part in parts
            for s, p in zip(part.slots.tolist(), part.positions.tolist(), strict=True)
        }
        selection = StepSelection(self.shape, self.cache.pool, [work])
        recorder = Recorder(selection, position_of)
        indices = torch.tensor([sequence.view.index])
        step = AttentionStep(
            num_decode=0,
            decode=None,
            chunks=[PrefillChunk(0, size, begin, 0, None)],
            prefill=self.cache.views.lists(indices),
            new_slots=slots.view(LAYERS, HEADS, size).transpose(1, 2),
            choose_view=recorder,
        )
        attend = self.backend.begin(step)
        for layer in range(LAYERS):
            inputs = [x[layer, begin : begin + size].clone() for x in (self.q, self.k, self.v)]
            got = attend(layer, *inputs)
            mask = causal_mask(begin, size)[None].repeat(HEADS, 1, 1)
            if recorder.seen[layer] is not None:
                for head, kept in enumerate(recorder.seen[layer] or []):
                    dropped = torch.tensor([p not in kept for p in range(begin)], dtype=torch.bool)
                    mask[head, :, :begin] &= ~dropped
            expected = masked_attention(self, layer, slice(begin, begin + size), mask)
            assert torch.allclose(got, expected, atol=1e-5)
        view = selection.decode_view(0)
        if view is not None:
            self.cache.show([sequence], [view.lengths], [view.slots])
            self.kept = [
                {position_of[int(s)] for s in row}
                for row in torch.split(view.slots, view.lengths.tolist())
            ]
        else:
            self.kept = [set(range(sequence.computed)) for _ in range(LAYERS * HEADS)]

    def decode(self, sequence: Sequence, steps: int) -> None:
        """Attend with new tokens over the decode view."""
        end = self.q.shape[1]
        generator = torch.Generator().manual_seed(8)
        extra = self.q.shape[2]
        q = torch.randn(LAYERS, steps, extra, DIM, generator=generator) * 2
        k, v = torch.randn(2, LAYERS, steps, HEADS, DIM, generator=generator)
        self.q, self.k, self.v = (
            torch.cat([old, new], dim=1) for old, new in ((self.q, q), (self.k, k), (self.v, v))
        )
        indices = torch.tensor([sequence.view.index])
        for position in range(end, end + steps):
            assert self.cache.reserve([sequence])
            self.cache.step([sequence], indices)
            lists = self.cache.views.lists(indices)
            new_slots = self.cache.views.last_slots(lists).transpose(0, 1)
            attend = self.backend.begin(AttentionStep(1, lists, [], None, new_slots))
            tokens = slice(position, position + 1)
            for layer in range(LAYERS):
                got = attend(layer, *(x[layer, tokens].clone() for x in (self.q, self.k, self.v)))
                mask = causal_mask(position, 1)[None].repeat(HEADS, 1, 1)
                for head in range(HEADS):
                    kept = self.kept[layer * HEADS + head]
                    for past in range(end):
                        mask[head, 0, past] &= past in kept
                expected = masked_attention(self, layer, tokens, mask)
                assert torch.allclose(got, expected, atol=1e-5)


def causal_mask(begin: int, size: int) -> Tensor:
    """Bool ``[size, begin + size]``, True where a query sees a position."""
    return torch.ones(size, begin + size, dtype=torch.bool).tril(begin)


def masked_attention(model: Model, layer: int, tokens: slice, mask: Tensor) -> Tensor:
    """Dense attention of ``tokens`` under ``mask`` ``[Hkv, n, end]``."""
    q = model.q[layer, tokens].view(-1, HEADS, model.shape.group, DIM)
    k, v = model.k[layer, : tokens.stop], model.v[layer, : tokens.stop]
    logits = torch.einsum("nhgd,mhd->hgnm", q, k) * model.shape.scale
    weights = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("hgnm,mhd->nhgd", weights, v).reshape(q.shape[0], -1)


# Chunk size and prompt length: several chunks each, the last one shorter.
SIZES = [(1, 45), (7, 90), (64, 200), (512, 560)]


@pytest.mark.parametrize("backend", ["cpu", "torch", "cuda"])
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize(("chunk", "tokens"), SIZES)
@pytest.mark.parametrize("group", [1, 3, 7])
def test_views_equal_masked_attention(
    backend: str, policy: str, group: int, chunk: int, tokens: int
) -> None:
    model = Model(group, policy, 0.4, backend, tokens)
    sequence = model.cache.begin(model.cache.match(Namespace(), np.zeros(0, np.int32)), tokens)
    assert sequence is not None
    while sequence.computed < tokens:
        model.prefill(sequence, min(chunk, tokens - sequence.computed))
    assert min(len(kept) for kept in model.kept) < tokens
    model.decode(sequence, 3)
    model.cache.check()


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_prefix_hit_selects_anew_from_everything(policy: str, group: int, chunk: int) -> None:
    model = Model(group, policy, 0.3, "cpu", 160)
    ids = np.arange(160, dtype=np.int32)
    first = model.cache.begin(model.cache.match(Namespace(), ids), 160)
    assert first is not None
    model.prefill(first, 100)
    model.cache.commit(Namespace(), first, ids[:100])
    model.cache.release(Namespace(), first, ids[:100])
    again = model.cache.begin(model.cache.match(Namespace(), ids), 160)
    assert again is not None and again.computed == 100
    while again.computed < 160:
        model.prefill(again, min(chunk, 160 - again.computed))
    model.decode(again, 2)
    model.cache.release(Namespace(), again, ids[:160])
    model.cache.check()


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_budget_of_everything_drops_nothing(policy: str) -> None:
    model = Model(2, policy, 1.0, "cpu", 120)
    sequence = model.cache.begin(model.cache.match(Namespace(), np.zeros(0, np.int32)), 120)
    assert sequence is not None
    while sequence.computed < 120:
        model.prefill(sequence, 40)
    assert all(kept == set(range(120)) for kept in model.kept)


def test_kept_tokens_are_what_the_budget_says() -> None:
    model = Model(3, "tca", 0.3, "cpu", 300)
    sequence = model.cache.begin(model.cache.match(Namespace(), np.zeros(0, np.int32)), 300)
    assert sequence is not None
    model.prefill(sequence, 300)
    candidates = (300 - WINDOW) // BLOCK
    table = model.sparsity.settings.decode
    expected = table.kept_tokens(candidates).reshape(-1) + 300 - candidates * BLOCK
    assert [len(kept) for kept in model.kept] == expected.tolist()
    assert all(set(range(candidates * BLOCK, 300)) <= kept for kept in model.kept)
