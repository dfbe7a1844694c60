"""Probe scores: the reference against float64 softmaxes, the kernels against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import TOLERANCE, random_lists, random_pool, relative_error, slots_of
from torch import Tensor

from tca_kernels import reference
from tca_kernels.score import (
    PAIRED_CONFIG,
    ScoreConfig,
    ScoreTables,
    fits_paired,
    probe_scores,
    probe_scores_by_tables,
)

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def case(
    lengths: Tensor,
    counts: Tensor,
    probes: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    arena, start, num_slots = random_lists(lengths)
    used = torch.cat(slots_of(arena, start, lengths))
    kv = random_pool(num_slots, head_dim, dtype, device, used)
    items, heads = lengths.shape
    q = torch.randn(items, probes, heads * group, head_dim).to(dtype).to(device)
    return q, kv, arena.to(device), start.to(device), lengths, counts


def dense(inputs: Case, scale: float) -> Tensor:
    """Every probe's own softmax over what it sees, in float64."""
    q, kv, arena, start, lengths, counts = inputs
    items, probes, num_q_heads, _ = q.shape
    heads = start.shape[1]
    group = num_q_heads // heads
    lists = slots_of(arena, start, lengths)
    out = []
    for n in range(items):
        for h in range(heads):
            length = int(lengths[n, h])
            keys = kv[lists[n * heads + h], 0].double()
            mean = torch.zeros(length, dtype=torch.float64)
            for i in range(probes):
                seen = length - probes + 1 + i
                for g in range(group):
                    logits = scale * (keys[:seen] @ q[n, i, h * group + g].double())
                    mean[:seen] += logits.softmax(0) / (probes * group)
            out.append(mean[: int(counts[n, h])])
    return torch.cat(out)


RAGGED = (torch.tensor([[5, 70], [33, 130]]), torch.tensor([[5, 64], [0, 96]]))


@pytest.mark.parametrize(("probes", "group"), [(1, 1), (1, 4), (5, 3)])
def test_reference_is_mean_of_softmaxes(probes: int, group: int) -> None:
    inputs = case(*RAGGED, probes, group, 32, torch.float32, torch.device("cpu"))
    scores = reference.probe_scores(*inputs, 0.3)
    assert relative_error(scores, dense(inputs, 0.3)) < 1e-5


@pytest.mark.parametrize(
    ("probes", "group", "head_dim"), [(1, 1, 64), (5, 3, 64), (4, 4, 128), (2, 7, 256)]
)
def test_kernel_matches_reference(
    probes: int, group: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = case(*RAGGED, probes, group, head_dim, dtype, device)
    scores = probe_scores(*inputs, head_dim**-0.5)
    expected = reference.probe_scores(*inputs, head_dim**-0.5)
    assert scores.dtype is torch.float32
    assert relative_error(scores, expected) < TOLERANCE[dtype]


def test_lists_of_many_chunks(device: torch.device) -> None:
    """Several programs per list: their log-sum-exps must be combined before the second pass."""
    lengths, counts = torch.tensor([[300, 517]]), torch.tensor([[256, 512]])
    inputs = case(lengths, counts, 6, 2, 32, torch.float32, device)
    scores = probe_scores(*inputs, 0.4, ScoreConfig(block=16, num_warps=4, num_stages=2))
    assert relative_error(scores, reference.probe_scores(*inputs, 0.4)) < 1e-5


def test_items_may_share_a_list(device: torch.device) -> None:
    """Sub-chunks of one request: the same start (stride 0), growing lengths, strided queries."""
    lengths = torch.tensor([[40, 40], [72, 72], [100, 100]])
    counts = torch.tensor([[32, 32], [64, 64], [96, 96]])
    q, kv, arena, start, _, _ = case(lengths[2:], counts[2:], 3, 2, 32, torch.float32, device)
    q = torch.randn(3, 3, 2 * 4, 32, device=device)[:, :, ::2]
    inputs = (q, kv, arena, start.expand(3, 2), lengths, counts)
    scores = probe_scores(*inputs, 0.3)
    assert relative_error(scores, reference.probe_scores(*inputs, 0.3)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("items", [2, 3, 4])
@pytest.mark.parametrize(("probes", "group", "head_dim"), [(32, 4, 128), (12, 3, 64), (17, 7, 128)])
@pytest.mark.parametrize("block", [64, 128])
def test_paired_kernels_match_reference(
    dtype: torch.dtype, items: int, probes: int, group: int, head_dim: int, block: int
) -> None:
    """Prefixes of one list, cut off inside and at the border of a tile, over several programs."""
    cuda = torch.device("cuda")
    lengths = torch.tensor([[640, 640], [641, 643], [2048, 1999], [5000, 5121]])[-items:]
    counts = torch.tensor([[128, 128], [0, 576], [1920, 1856], [4992, 5121]])[-items:]
    longest = lengths[-1:]
    _, kv, arena, start, _, _ = case(longest, longest, probes, group, head_dim, dtype, cuda)
    q = torch.randn(items, probes, 2 * group, head_dim, device=cuda).to(dtype) * 2
    inputs = (q, kv, arena, start.expand(items, 2), lengths, counts)
    assert fits_paired(q, kv, inputs[3])
    config = replace(PAIRED_CONFIG, block=block, num_warps=block // 16, programs=1)
    scores = probe_scores(*inputs, head_dim**-0.5, config)
    expected = reference.probe_scores(*inputs, head_dim**-0.5)
    assert relative_error(scores, expected) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("probes", "group"), [(32, 4), (32, 7), (8, 4)])
def test_chunk_of_a_prompt(probes: int, group: int) -> None:
    """Four selections as prefill makes them, by whatever kernels are the default."""
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    lengths = torch.tensor([3000, 5048, 7096, 9144])[:, None].expand(4, 2)
    longest = lengths[-1:]
    _, kv, arena, start, _, _ = case(longest, longest, probes, group, 128, bf16, cuda)
    q = torch.randn(4, probes, 2 * group, 128, device=cuda).to(bf16)
    inputs = (q, kv, arena, start.expand(4, 2), lengths, (lengths - 2560) // 64 * 64)
    expected = reference.probe_scores(*inputs, 128**-0.5)
    assert relative_error(probe_scores(*inputs, 128**-0.5), expected) < TOLERANCE[bf16]


def test_more_probes_than_one_product_takes(device: torch.device) -> None:
    lengths, counts = torch.tensor([[70]]), torch.tensor([[70]])
    inputs = case(lengths, counts, 40, 8, 32, torch.float32, device)
    scores = probe_scores(*inputs, 0.3)
    assert relative_error(scores, reference.probe_scores(*inputs, 0.3)) < 1e-5
    assert float(scores.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize(("probes", "group"), [(3, 2), (40, 8)])
def test_tables_score_as_the_lists_sizes(
    backend: str,
    probes: int,
    group: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of more probes than one product takes, which see prefixes of the tables' lists."""
    if backend == "reference":
        monkeypatch.setattr("tca_kernels.dispatch.use_triton", lambda tensor: False)
    lengths, counts = torch.tensor([[50, 70], [90, 64]]), torch.tensor([[50, 64], [0, 16]])
    inputs = case(lengths, counts, probes, group, 32, torch.float32, device)
    tables = ScoreTables.build(lengths, counts, device)
    for _ in range(2):
        found = probe_scores_by_tables(*inputs[:4], tables, 0.3)
        assert torch.equal(found, probe_scores(*inputs, 0.3))


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    lengths, counts = torch.tensor([[90, 64]]), torch.tensor([[90, 64]])
    q, *rest = case(lengths, counts, 4, 2, 32, torch.float32, device)
    scores = probe_scores(q * 1e3, *rest, 1.0)
    # Float32 knows logits of ten thousand to a thousandth, and weights no better.
    assert relative_error(scores, reference.probe_scores(q * 1e3, *rest, 1.0)) < 1e-2


def test_refuses_lists_shorter_than_probes_or_counts(device: torch.device) -> None:
    lengths = torch.tensor([[4]])
    q, kv, arena, start, _, _ = case(lengths, lengths, 3, 1, 32, torch.float32, device)
    for wrong_lengths, counts in ((torch.tensor([[2]]), lengths * 0), (lengths, lengths + 1)):
        with pytest.raises(ValueError, match="every list must hold"):
            probe_scores(q, kv, arena, start, wrong_lengths, counts, 1.0)


def test_refuses_lengths_on_the_device() -> None:
    """They decide the launch: reading them back would stall the host."""
    lengths = torch.tensor([[4]])
    inputs = case(lengths, lengths, 1, 1, 32, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="lengths must be on the host"):
        probe_scores(*inputs[:4], lengths.to("meta"), lengths, 1.0)
