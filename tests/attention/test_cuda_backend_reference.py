"""The CUDA backend's layout of prefill work, on the CPU with the kernels' references."""

from __future__ import annotations

import pytest
import torch

from tca_runtime.attention.triton_backend import TritonBackend
from tests.attention.steps import Request, dense, even, make_case, make_shape, run

RAGGED = [[[0, 40], [300, 1]], [[129, 700], [5, 64]], [[31, 32], [33, 1]]]


@pytest.mark.parametrize("decode", [[], RAGGED], ids=["prefill", "mixed"])
@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [Request(even(0), 64)],
        [Request(even(0), 64), Request(even(0), 64)],
        [Request(RAGGED[1], 130)],
        [Request(even(0), 64), Request(RAGGED[1], 7), Request(even(33), 130), Request(even(0), 9)],
    ],
)
def test_one_step(chunks: list[Request], decode: list[list[list[int]]]) -> None:
    if not chunks and not decode:
        return
    case = make_case(make_shape(3, 64), decode, chunks)
    expected, pool = dense(case)
    kv = case.kv.clone()
    for output, reference in zip(run(TritonBackend(case.shape, kv), case), expected, strict=True):
        torch.testing.assert_close(output, reference, atol=1e-5, rtol=1e-5)
    assert torch.equal(kv, pool)
