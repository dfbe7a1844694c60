"""The CPU backend and the torch reference against dense masked attention."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tca_runtime.attention import create_backend
from tca_runtime.attention.base import AttentionShape
from tca_runtime.attention.cpu_backend import CpuAttention
from tca_runtime.attention.triton_backend import TritonBackend
from tests.attention.steps import LAYERS, Case, Request, dense, even, make_case, make_shape, run

GEOMETRIES = [(1, 64), (3, 64), (7, 64), (3, 128)]
RAGGED = [[[0, 40], [300, 1]], [[129, 700], [5, 64]], [[31, 32], [33, 1]]]


def check(name: str, case: Case, tolerance: float = 1e-5) -> None:
    expected, pool = dense(case)
    kv = case.kv.clone()
    outputs = run(create_backend(name, case.shape, kv), case)
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference, atol=tolerance, rtol=tolerance)
    assert torch.equal(kv, pool)


@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("group", "head_dim"), GEOMETRIES)
def test_decode_over_ragged_lists(name: str, group: int, head_dim: int, shuffled: bool) -> None:
    check(name, make_case(make_shape(group, head_dim), RAGGED, [], shuffled=shuffled))


@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 512])
@pytest.mark.parametrize("past", [even(0), even(100), RAGGED[0]], ids=["none", "even", "ragged"])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (7, 64), (3, 128)])
def test_one_chunk(
    name: str, tokens: int, past: list[list[int]], group: int, head_dim: int
) -> None:
    check(name, make_case(make_shape(group, head_dim), [], [Request(past, tokens)]))


@pytest.mark.parametrize("part", [1, 17, 64, 200])
@pytest.mark.parametrize("past", [even(0), even(100), RAGGED[0]], ids=["none", "even", "ragged"])
@pytest.mark.parametrize("group", [1, 7])
def test_a_chunk_in_parts(part: int, past: list[list[int]], group: int) -> None:
    case = make_case(make_shape(group, 64), [], [Request(past, 130)])
    expected, pool = dense(case)
    kv = case.kv.clone()
    attention = create_backend("cpu", case.shape, kv).begin(case.step)
    assert isinstance(attention, CpuAttention)
    for layer, (q, k, v) in enumerate(case.inputs):
        attend = attention.split(layer, q, k, v)
        places = [(a, min(a + part, 130)) for a in range(0, 130, part)]
        output = torch.cat([attend(a, b) for a, b in places])
        torch.testing.assert_close(output, expected[layer], atol=1e-5, rtol=1e-5)
    assert torch.equal(kv, pool)


@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_and_several_chunks_in_one_step(name: str, dtype: torch.dtype) -> None:
    chunks = [Request(even(0), 64), Request(RAGGED[1], 7), Request(even(33), 130)]
    case = make_case(make_shape(3, 64, dtype=dtype), RAGGED, chunks)
    check(name, case, tolerance=1e-5 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
def test_keys_and_values_are_stored_without_queries(name: str) -> None:
    """A last layer that nobody reads."""
    case = make_case(make_shape(3, 64), [], [Request(RAGGED[0], 9), Request(even(0), 64)])
    _, pool = dense(case)
    kv = case.kv.clone()
    # Triton's backend runs its kernels' references on a CPU.
    make = TritonBackend if name == "triton" else partial(create_backend, name)
    attend = make(case.shape, kv).begin(case.step)
    for layer, (q, k, v) in enumerate(case.inputs):
        assert attend(layer, q[:0], k, v).shape == (0, q[0].numel())
    assert torch.equal(kv, pool)


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_inference_mode(name: str) -> None:
    with torch.inference_mode():
        check(name, make_case(make_shape(3, 64), RAGGED, [Request(RAGGED[0], 9)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_leave_the_same_outputs_as_one_prefill(dtype: torch.dtype) -> None:
    """Splitting a prompt changes which kernels run, not what its tokens attend to."""
    shape = make_shape(3, 64, dtype=dtype)
    whole = make_case(shape, [], [Request(even(0), 200)])
    (expected, _), kv = dense(whole), whole.kv.clone()
    backend = create_backend("cpu", shape, kv)
    for begin, end in pairwise((0, 1, 64, 65, 190, 200)):
        entries = [[s[begin:end] for s in heads] for heads in whole.slots[0]]
        part = make_case(shape, [], [Request(even(begin), end - begin)])
        assert part.step.prefill is not None
        for layer in range(LAYERS):
            for head in range(shape.num_kv_heads):
                start = int(part.step.prefill.start[0, layer, head])
                full = whole.slots[0][layer][head]
                part.step.prefill.arena[start : start + end] = full[:end]
                part.step.new_slots[layer, :, head] = entries[layer][head]
        attend = backend.begin(part.step)
        for layer, inputs in enumerate(whole.inputs):
            q, k, v = (tensor[begin:end] for tensor in inputs)
            tolerance = 1e-5 if dtype is torch.float32 else 1e-2
            torch.testing.assert_close(
                attend(layer, q, k, v), expected[layer][begin:end], atol=tolerance, rtol=tolerance
            )


lengths = st.lists(
    st.lists(st.integers(0, 90), min_size=2, max_size=2), min_size=LAYERS, max_size=LAYERS
)


@settings(max_examples=60, deadline=None)
@given(
    decode=st.lists(lengths, max_size=3),
    chunks=st.lists(st.builds(Request, lengths, st.integers(1, 40)), max_size=3),
    group=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_random_structures(
    decode: list[list[list[int]]], chunks: list[Request], group: int, seed: int
) -> None:
    if not decode and not chunks:
        return
    case = make_case(make_shape(group, 64), decode, chunks, seed)
    check("torch", case)
    check("cpu", case)


def test_threads_of_torch_do_not_change_the_result() -> None:
    case = make_case(make_shape(3, 64), RAGGED, [Request(RAGGED[1], 40)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        check("cpu", case)
        torch.set_num_threads(64)
        check("cpu", case)
    finally:
        torch.set_num_threads(before)


def test_the_kernels_leave_torchs_thread_count_alone() -> None:
    """Numba's pool starts once per process, so only a fresh process shows what it changes."""
    code = (
        "import torch; torch.set_num_threads(1);"
        "from tca_runtime.attention import create_backend;"
        "from tests.attention.steps import Request, even, make_case, make_shape, run;"
        "case = make_case(make_shape(3, 64), [even(900)], [Request(even(5), 9)]);"
        "run(create_backend('cpu', case.shape, case.kv), case);"
        "print(torch.get_num_threads())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "1", output.stderr


def test_parts_are_smaller_where_their_tokens_see_more() -> None:
    backend = create_backend("cpu", *_small())
    sizes = {0: 512, 8192: 512, 16384: 256, 32768: 128, 1 << 20: 64}
    assert {position: backend.part_tokens_at(position) for position in sizes} == sizes
    assert create_backend("torch", *_small()).part_tokens_at(32768) is None


def _small() -> tuple[AttentionShape, torch.Tensor]:
    case = make_case(make_shape(1, 64), [], [Request(even(0), 1)])
    return case.shape, case.kv
