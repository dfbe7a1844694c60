"""Random attention steps over a shared slot pool, and a dense oracle for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tca_runtime.attention.base import (
    AttentionBackend,
    AttentionShape,
    AttentionStep,
    PrefillChunk,
    SlotLists,
)

LAYERS = 2


@dataclass(frozen=True)
class Request:
    """``past``: list lengths before the step, ``[L][Hkv]``; ``tokens``: how many the step adds."""

    past: list[list[int]]
    tokens: int


@dataclass(frozen=True)
class Case:
    """A step, its inputs per layer, the pool before it, and every list as plain slots."""

    shape: AttentionShape
    kv: Tensor
    step: AttentionStep
    inputs: list[tuple[Tensor, Tensor, Tensor]]
    slots: list[list[list[Tensor]]]
    spans: list[slice]


def make_shape(
    group: int, head_dim: int, num_kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> AttentionShape:
    return AttentionShape(
        num_layers=LAYERS,
        num_q_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def even(length: int, num_kv_heads: int = 2) -> list[list[int]]:
    return [[length] * num_kv_heads for _ in range(LAYERS)]


def make_case(
    shape: AttentionShape,
    decode: Sequence[list[list[int]]],
    chunks: Sequence[Request],
    seed: int = 0,
    shuffled: bool = True,
) -> Case:
    """Lay out requests; ``decode`` gives the past of every decoding request."""
    generator = torch.Generator().manual_seed(seed)
    requests = [Request(past, 1) for past in decode] + list(chunks)
    sizes = [(n + r.tokens) for r in requests for layer in r.past for n in layer]
    num_slots = sum(sizes) + 7
    order = torch.randperm(num_slots, generator=generator) if shuffled else torch.arange(num_slots)
    flat = iter(torch.split(order[: sum(sizes)].int(), sizes))
    slots = [[[next(flat) for _ in layer] for layer in r.past] for r in requests]

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(shape.dtype)

    spans: list[slice] = []
    for request in requests:
        begin = spans[-1].stop if spans else 0
        spans.append(slice(begin, begin + request.tokens))
    total = spans[-1].stop
    width = shape.num_q_heads + 2 * shape.num_kv_heads
    heads = [shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads]
    inputs = []
    for _ in range(shape.num_layers):
        # Slices of one fused projection, as models pass them: strided along the token axis.
        q, k, v = draw(total, width, shape.head_dim).split(heads, dim=1)
        inputs.append((q, k, v))
    new_slots = torch.empty(shape.num_layers, total, shape.num_kv_heads, dtype=torch.int32)
    for request, span, layers in zip(requests, spans, slots, strict=True):
        for layer, lists in enumerate(layers):
            for head, entries in enumerate(lists):
                new_slots[layer, span, head] = entries[-request.tokens :]
    count = len(decode)
    prefill = [
        PrefillChunk(span.start, r.tokens, max(map(max, r.past)), i, _uniform(r))
        for i, (r, span) in enumerate(zip(chunks, spans[count:], strict=True))
    ]
    step = AttentionStep(
        num_decode=count,
        decode=_slot_lists(slots[:count]),
        chunks=prefill,
        prefill=_slot_lists(slots[count:]),
        new_slots=new_slots,
    )
    return Case(shape, draw(num_slots, 2, shape.head_dim), step, inputs, slots, spans)


def run(backend: AttentionBackend, case: Case) -> list[Tensor]:
    attend = backend.begin(case.step)
    return [attend(layer, q, k, v) for layer, (q, k, v) in enumerate(case.inputs)]


def dense(case: Case) -> tuple[list[Tensor], Tensor]:
    """Outputs of every layer by masked dense SDPA, and the pool after the step."""
    kv = case.kv.clone()
    outs = []
    for layer, (q, k, v) in enumerate(case.inputs):
        kv[case.step.new_slots[layer].long()] = torch.stack((k, v), dim=2)
        out = torch.empty(q.shape, dtype=q.dtype)
        for span, layers in zip(case.spans, case.slots, strict=True):
            for head, entries in enumerate(layers[layer]):
                heads = slice(head * case.shape.group, (head + 1) * case.shape.group)
                n, m = span.stop - span.start, len(entries)
                mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
                keys, values = kv[entries.long()].float().unbind(1)
                attended = F.scaled_dot_product_attention(
                    q[span, heads].float().transpose(0, 1),
                    keys.expand(case.shape.group, -1, -1),
                    values.expand(case.shape.group, -1, -1),
                    attn_mask=mask,
                )
                out[span, heads] = attended.transpose(0, 1).to(q.dtype)
        outs.append(out.flatten(1))
    return outs, kv


def _uniform(request: Request) -> int | None:
    lengths = {n for layer in request.past for n in layer}
    return lengths.pop() + request.tokens if len(lengths) == 1 else None


def _slot_lists(requests: list[list[list[Tensor]]]) -> SlotLists | None:
    """Lists in one arena, with unused entries before each, as growing views leave them."""
    if not requests:
        return None
    gap = torch.zeros(3, dtype=torch.int32)
    lists = [entries for layers in requests for heads in layers for entries in heads]
    length = torch.tensor([len(entries) for entries in lists])
    start = (length + len(gap)).cumsum(0) - length
    shape = (len(requests), len(requests[0]), len(requests[0][0]))
    return SlotLists(
        arena=torch.cat([part for entries in lists for part in (gap, entries)]),
        start=start.view(shape),
        length=length.int().view(shape),
    )
