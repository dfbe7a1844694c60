"""The compiled CPU kernels against float64 arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tca_kernels.cpu.decode import MIN_RANGE, decode_kernel
from tca_kernels.cpu.huge_pages import HUGE_PAGE, advise_huge_pages
from tca_kernels.cpu.jit import use_threads
from tca_kernels.cpu.write import write_kernel

GROUP, HEAD_DIM = 3, 64
SCALE = HEAD_DIM**-0.5

Array = NDArray[np.float32]


def reference(query: Array, rows: Array) -> Array:
    """``query [G, D]`` over ``rows [n, 2, D]``."""
    scores = query.astype(np.float64) @ rows[:, 0].T.astype(np.float64) * SCALE
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ rows[:, 1]).astype(np.float32)


def decode(
    kv: Array, lists: list[list[NDArray[np.uint32]]], queries: Array, threads: int, layer: int = 0
) -> Array:
    """Run the kernel on ``lists [B][Hkv]``, shown to it as ``layer`` of three."""
    lengths = np.array([[len(slots) for slots in heads] for heads in lists], dtype=np.int32)
    ends = lengths.cumsum().reshape(lengths.shape)
    start = np.zeros((len(lists), 3, lengths.shape[1]), dtype=np.int64)
    length = np.ones_like(start, dtype=np.int32)
    start[:, layer], length[:, layer] = ends - lengths, lengths
    out = np.full_like(queries, np.nan)
    use_threads(2)
    decode_kernel(HEAD_DIM)(
        kv,
        np.concatenate([slots for heads in lists for slots in heads]),
        start,
        length,
        layer,
        queries,
        SCALE,
        out,
        np.full((threads, 2, GROUP, HEAD_DIM), np.nan, np.float32),
        np.full((threads, 2, 2, GROUP), np.nan, np.float32),
    )
    return out


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "lengths",
    [
        [[1, 1]],
        [[31, 32], [33, 65]],
        [[5 * MIN_RANGE, 1], [1, 2]],
        [[3, 9 * MIN_RANGE]],
        [[MIN_RANGE, MIN_RANGE], [MIN_RANGE, MIN_RANGE]],
        [[700, 1], [2, 5000], [1, 1], [901, 40]],
    ],
)
def test_matches_float64_however_lists_are_cut(lengths: list[list[int]], threads: int) -> None:
    rng = np.random.default_rng(1)
    total = sum(map(sum, lengths))
    kv = rng.standard_normal((total, 2, HEAD_DIM), dtype=np.float32)
    slots = iter(rng.permutation(total).astype(np.uint32))
    lists = [[np.fromiter(slots, np.uint32, n) for n in heads] for heads in lengths]
    queries = rng.standard_normal((len(lists), 2 * GROUP, HEAD_DIM), dtype=np.float32)
    out = decode(kv, lists, queries, threads, layer=2)
    for b, heads in enumerate(lists):
        for h, entries in enumerate(heads):
            rows = slice(h * GROUP, (h + 1) * GROUP)
            np.testing.assert_allclose(
                out[b, rows], reference(queries[b, rows], kv[entries]), atol=2e-6, rtol=1e-5
            )


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1000.0])
@pytest.mark.parametrize("rising", [True, False])
def test_extreme_scores(magnitude: float, rising: bool) -> None:
    """A running maximum that rises in every block, or never again, neither overflows nor leaks."""
    rng = np.random.default_rng(2)
    count = 1000
    kv = rng.standard_normal((count, 2, HEAD_DIM), dtype=np.float32)
    ramp = np.linspace(-1, 1, count, dtype=np.float32) if rising else np.linspace(1, -1, count)
    kv[:, 0] = 0
    kv[:, 0, 5] = ramp
    queries = np.zeros((1, GROUP, HEAD_DIM), np.float32)
    queries[..., 5] = magnitude
    out = decode(kv, [[np.arange(count, dtype=np.uint32)]], queries, threads=3)
    np.testing.assert_allclose(out[0], reference(queries[0], kv), atol=1e-5, rtol=2e-4)


def test_queries_and_output_may_be_strided() -> None:
    rng = np.random.default_rng(3)
    kv = rng.standard_normal((600, 2, HEAD_DIM), dtype=np.float32)
    lists = [[rng.permutation(600).astype(np.uint32)]]
    fused = rng.standard_normal((1, 3 * GROUP, HEAD_DIM), dtype=np.float32)
    queries = fused[:, ::3]
    np.testing.assert_allclose(
        decode(kv, lists, queries, 2)[0], reference(queries[0], kv[lists[0][0]]), atol=2e-6
    )


def test_write_touches_only_the_named_slots() -> None:
    rng = np.random.default_rng(4)
    kv = rng.standard_normal((50, 2, HEAD_DIM), dtype=np.float32)
    before = kv.copy()
    slots = rng.permutation(50)[:12].astype(np.uint32).reshape(6, 2)
    fused = rng.standard_normal((6, 4, HEAD_DIM), dtype=np.float32)
    keys, values = fused[:, :2], fused[:, 2:]
    write_kernel()(kv, slots, keys, values)
    np.testing.assert_array_equal(kv[slots, 0], keys)
    np.testing.assert_array_equal(kv[slots, 1], values)
    others = np.setdiff1d(np.arange(50), slots)
    np.testing.assert_array_equal(kv[others], before[others])


def test_advice_for_huge_pages_reaches_the_mapping() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no transparent huge pages")
    tensor = torch.arange(4 * HUGE_PAGE, dtype=torch.uint8)
    before = tensor.clone()
    assert advise_huge_pages(tensor)
    assert torch.equal(tensor, before)
    assert "hg" in _mapping_flags(tensor.data_ptr() + 2 * HUGE_PAGE)


def test_tensors_without_a_whole_huge_page_are_left_alone() -> None:
    assert not advise_huge_pages(torch.zeros(1000))


def _mapping_flags(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and ":" not in head:
            begin, end = (int(bound, 16) for bound in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("address is not mapped")
