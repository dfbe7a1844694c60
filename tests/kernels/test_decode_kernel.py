"""Decode attention: the reference against dense float64 math, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import TOLERANCE, random_lists, random_pool, relative_error, slots_of
from torch import Tensor

from tca_kernels import reference
from tca_kernels.decode import DecodeConfig, DecodeWorkspace, decode_attention

# Empty lists leave unread 0 / 0 partials, which only the interpreter remarks on.
pytestmark = pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)
RAGGED = [[1, 40, 7], [17, 16, 15], [0, 33, 100], [64, 2, 0]]
SMALL = DecodeConfig(tile=16, num_warps=4, num_stages=2, programs_per_sm=5)


def dense(
    q: Tensor, kv: Tensor, arena: Tensor, start: Tensor, length: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One softmax at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    group = q.shape[1] // start.shape[1]
    lists = slots_of(arena, start, length)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            rows = kv[lists[b * start.shape[1] + h // group]].double()
            if len(rows):
                logits = scale * (rows[:, 0] @ q[b, h].double())
                out[b, h] = logits.softmax(0) @ rows[:, 1]
                lse[b, h] = logits.logsumexp(0)
    return out, lse


def case(
    length: Tensor, group: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arena, start, num_slots = random_lists(length)
    used = torch.cat(slots_of(arena, start, length))
    kv = random_pool(num_slots, head_dim, dtype, device, used)
    q = torch.randn(length.shape[0], length.shape[-1] * group, head_dim).to(dtype).to(device)
    return q, kv, arena.to(device), start.to(device), length.to(device)


@pytest.mark.parametrize("group", [1, 3, 7])
def test_reference_is_dense_attention(group: int) -> None:
    length = torch.tensor(RAGGED, dtype=torch.int32)
    inputs = case(length, group, 32, torch.float32, torch.device("cpu"))
    out, lse = reference.decode_attention(*inputs, 0.3)
    expected, expected_lse = dense(*inputs, 0.3)
    assert relative_error(out, expected) < 1e-5
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("head_dim", "group"), [(64, 7), (128, 1), (128, 4), (256, 3)])
def test_kernel_matches_reference(
    head_dim: int, group: int, dtype: torch.dtype, device: torch.device
) -> None:
    length = torch.tensor(RAGGED, dtype=torch.int32)
    inputs = case(length, group, head_dim, dtype, device)
    lse = torch.full(inputs[0].shape[:2], torch.nan, device=device)
    out = torch.full_like(inputs[0], torch.nan)
    decode_attention(*inputs, head_dim**-0.5, out=out, lse=lse)
    expected, expected_lse = reference.decode_attention(*inputs, head_dim**-0.5)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert (out[2, :group] == 0).all()
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


def test_one_plan_serves_all_layers_of_ragged_tables(device: torch.device) -> None:
    """Tables are strided slices of ``[B, L, Hkv]``; tiles, programs and entries never line up."""
    length = torch.randint(0, 120, (3, 4, 2), dtype=torch.int32)
    length[0, 1] = 0
    length[:, 2] = 0
    arena, start, num_slots = random_lists(length)
    used = torch.cat(slots_of(arena, start, length))
    kv = random_pool(num_slots, 32, torch.float32, device, used)
    q = torch.randn(3, 2 * 4, 2 * 32, device=device)[:, :, :32]
    arena, start, length = arena.to(device), start.to(device), length.to(device)
    workspace = DecodeWorkspace(5, 4, 8, 2, 32, torch.float32, device, SMALL)
    workspace.plan(length)
    for layer in range(4):
        args = (q, kv, arena, start[:, layer], length[:, layer], 0.2)
        out = decode_attention(*args, workspace=workspace, layer=layer)
        expected, _ = reference.decode_attention(*args)
        assert relative_error(out, expected) < 1e-5


def test_every_tile_has_exactly_one_program(device: torch.device) -> None:
    length = torch.randint(0, 300, (4, 3, 5), dtype=torch.int32).to(device)
    length[1] = 0
    workspace = DecodeWorkspace(4, 3, 5, 5, 32, torch.float32, device, SMALL)
    workspace.plan(length)
    for layer in range(3):
        tiles = (length[:, layer].flatten() + 15) // 16
        bounds = workspace.bounds[layer, :21].cpu()
        assert bounds.tolist() == [0, *tiles.cumsum(0).tolist()]
        total = int(bounds[-1])
        active = min(workspace.num_programs, total)
        for program in range(active):
            first = program * total // active
            entry = int(workspace.first[layer, program])
            assert bounds[entry] <= first < bounds[entry + 1]


def test_workspace_is_reusable_for_other_lengths(device: torch.device) -> None:
    workspace = DecodeWorkspace(2, 1, 4, 2, 32, torch.float32, device, SMALL)
    for high in (5, 200):
        length = torch.randint(1, high, (2, 2), dtype=torch.int32)
        inputs = case(length, 2, 32, torch.float32, device)
        workspace.plan(inputs[4][:, None])
        out = decode_attention(*inputs, 0.2, workspace=workspace)
        expected, _ = reference.decode_attention(*inputs, 0.2)
        assert relative_error(out, expected) < 1e-5


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    length = torch.tensor([[90, 50]], dtype=torch.int32)
    q, kv, arena, start, length = case(length, 2, 64, torch.float32, device)
    q = q * 1e3
    out = decode_attention(q, kv, arena, start, length, 1.0)
    expected, _ = reference.decode_attention(q, kv, arena, start, length, 1.0)
    assert relative_error(out, expected) < 1e-4


def test_refuses_wrong_pools_and_plans(device: torch.device) -> None:
    length = torch.tensor([[9]], dtype=torch.int32)
    q, kv, arena, start, length = case(length, 1, 32, torch.float32, device)
    with pytest.raises(ValueError, match="contiguous"):
        decode_attention(q, kv[::2], arena, start, length, 1.0)
    with pytest.raises(ValueError, match="power of two"):
        decode_attention(q[..., :24], kv[..., :24].contiguous(), arena, start, length, 1.0)
    workspace = DecodeWorkspace(4, 1, 1, 1, 32, torch.float32, device)
    with pytest.raises(ValueError, match="planned for 0"):
        decode_attention(q, kv, arena, start, length, 1.0, workspace=workspace)
    with pytest.raises(ValueError, match="exceed"):
        workspace.plan(length.expand(1, 2, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_32_bits() -> None:
    """Slots whose elements lie past 2^31, which an int32 offset would wrap."""
    device = torch.device("cuda")
    num_slots = (1 << 31) // 256 + 4096
    kv = torch.empty(num_slots, 2, 128, dtype=torch.bfloat16, device=device)
    arena = torch.arange(num_slots - 3000, num_slots, dtype=torch.int32, device=device)
    kv[-3000:] = torch.randn(3000, 2, 128, device=device).to(torch.bfloat16)
    start = torch.zeros(1, 1, dtype=torch.int64, device=device)
    length = torch.full((1, 1), 3000, dtype=torch.int32, device=device)
    q = torch.randn(1, 4, 128, device=device).to(torch.bfloat16)
    out = decode_attention(q, kv, arena, start, length, 128**-0.5)
    expected, _ = reference.decode_attention(q, kv, arena, start, length, 128**-0.5)
    assert relative_error(out, expected) < 1e-2
