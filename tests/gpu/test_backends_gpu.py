"""Attention backends on a GPU against dense masked attention on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tca_runtime.attention import create_backend
from tca_runtime.attention.base import AttentionShape, SlotLists
from tca_runtime.attention.pieces import Pieces, RaggedPrefill
from tests.attention.steps import Case, Request, dense, even, make_case, make_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RAGGED = [[[0, 40], [300, 1]], [[129, 700], [5, 64]], [[31, 32], [33, 1]]]
CHUNKS = [
    [Request(even(0), 64)],
    [Request(even(0), 64), Request(even(0), 64), Request(even(0), 7)],
    [Request(RAGGED[1], 130)],
    [Request(even(0), 64), Request(RAGGED[1], 7), Request(even(33), 130), Request(even(0), 9)],
]


def to_cuda(case: Case) -> Case:
    def lists(slots: SlotLists | None) -> SlotLists | None:
        if slots is None:
            return None
        return SlotLists(slots.arena.cuda(), slots.start.cuda(), slots.length.cuda())

    step = replace(
        case.step,
        decode=lists(case.step.decode),
        prefill=lists(case.step.prefill),
        new_slots=case.step.new_slots.cuda(),
    )
    shape = replace(case.shape, device=torch.device("cuda"))
    return replace(case, shape=shape, step=step)


@pytest.mark.parametrize("decode", [[], RAGGED], ids=["prefill", "mixed"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        ("flashinfer", 128, torch.bfloat16),
        ("flashinfer", 64, torch.bfloat16),
        ("triton", 128, torch.bfloat16),
        ("triton", 64, torch.float32),
    ],
)
def test_one_step(
    name: str,
    head_dim: int,
    dtype: torch.dtype,
    chunks: list[Request],
    decode: list[list[list[int]]],
) -> None:
    if name == "flashinfer":
        pytest.importorskip("flashinfer")
    case = make_case(make_shape(4, head_dim, dtype=dtype), decode, chunks)
    expected, pool = dense(case)
    there = to_cuda(case)
    kv = there.kv.cuda()
    attend = create_backend(name, there.shape, kv).begin(there.step)
    tolerance = 1e-2 if dtype is torch.bfloat16 else 2e-5
    for layer, inputs in enumerate(case.inputs):
        out = attend(layer, *(tensor.cuda() for tensor in inputs)).cpu()
        torch.testing.assert_close(out, expected[layer], atol=tolerance, rtol=tolerance)
    assert torch.equal(kv.cpu(), pool)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="only FA3's list of work is known",
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "group"), [(8, 4), (2, 7), (3, 3), (1, 2)])
def test_hopper_attends_to_pieces_in_place(heads: int, group: int, head_dim: int) -> None:
    pytest.importorskip("flashinfer")
    from tca_runtime.attention.flashinfer_backend import FlashInferPrefill

    device = torch.device("cuda")
    shape = AttentionShape(2, heads * group, heads, head_dim, torch.bfloat16, device)
    prefill = FlashInferPrefill(shape)
    dice = np.random.default_rng(heads)
    for spans in ([(0, 300), (300, 300)], [(5, 1), (9, 513), (600, 130)], [(40, 1000)]):
        pieces = Pieces.of(spans)
        lengths = pieces.lengths[:, None] + dice.integers(0, 900, (len(spans), heads))
        # Neighbours in memory, as queries are in the product they come from.
        q = torch.randn(1100, heads * group + 3, head_dim, device=device).bfloat16()[:, :-3]
        keys, values = torch.randn(2, int(lengths.sum()), head_dim, device=device).bfloat16()
        out = torch.randn(1100, heads * group, head_dim, device=device).bfloat16()
        expected = out.clone()
        assert prefill.attend_in_place(q, keys, values, pieces, lengths, out)
        RaggedPrefill.attend_pieces(prefill, q, keys, values, pieces, lengths, expected)
        assert torch.equal(out, expected)
