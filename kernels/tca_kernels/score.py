"""Importance of list entries: the mean softmax weight that probe queries give them."""

from __future__ import annotations

import functools
import importlib
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tca_kernels import dispatch, reference
from tca_kernels.dispatch import cdiv, check_lists, check_pool, host_table, next_power_of_2, upload

logger = logging.getLogger(__name__)

_MERGE_BLOCK = 16
_PAIRED_ROWS = (64, 128)
_PAIRED_HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class ScoreConfig:
    """How both scoring kernels run.

    Attributes
    ----------
    block : keys per step
    num_warps, num_stages : of a program
    programs : per multiprocessor; more share the work more evenly, and each costs a start
    paired : score two items that share a list in one program (Hopper only, see ``fits_paired``)
    """

    block: int
    num_warps: int
    num_stages: int
    programs: int = 8
    paired: bool = False


@dataclass(frozen=True, eq=False)
class ScoreTables:
    """The lists' sizes, with what the kernels read of them.

    Attributes
    ----------
    lengths, counts : int64 ``[N, Hkv]`` on the host, as in ``probe_scores``
    shortest, longest : length of a list
    most_scores, num_scores : largest and total count
    table : int64 ``[N * Hkv, 3]`` on the device: a list's length, its count, its first score
    """

    lengths: Tensor
    counts: Tensor
    shortest: int
    longest: int
    most_scores: int
    num_scores: int
    table: Tensor
    _shortened: dict[int, ScoreTables] = field(default_factory=dict, repr=False)

    @staticmethod
    def build(lengths: Tensor, counts: Tensor, device: torch.device) -> ScoreTables:
        """Tables of one upload.

        Parameters
        ----------
        lengths, counts : ``[N, Hkv]``, integer, on the host

        Raises
        ------
        ValueError
            If a list is shorter than its count, or a table is on the device.
        """
        lengths, counts = host_table(lengths, "lengths"), host_table(counts, "counts")
        if bool((counts > lengths).any()):
            raise ValueError("every list must hold the entries to be scored")
        return ScoreTables._of(lengths, counts, device)

    def shortened(self, tokens: int) -> ScoreTables:
        """Of lists that end ``tokens`` earlier; an entry beyond its list scores nothing.

        Made once: every layer of a chunk asks for the same.
        """
        if tokens not in self._shortened:
            shorter = ScoreTables._of(self.lengths - tokens, self.counts, self.table.device)
            self._shortened[tokens] = shorter
        return self._shortened[tokens]

    @staticmethod
    def _of(lengths: Tensor, counts: Tensor, device: torch.device) -> ScoreTables:
        ends = counts.flatten().cumsum(0)
        table = torch.stack((lengths.flatten(), counts.flatten(), ends - counts.flatten()), 1)
        return ScoreTables(
            lengths,
            counts,
            int(lengths.min()),
            int(lengths.max()),
            int(counts.max()),
            int(ends[-1]),
            upload(table, device),
        )


def default_config(rows: int, head_dim: int, dtype: torch.dtype) -> ScoreConfig:
    """Keep a tile's logits in registers, and queries and two tiles of keys in shared memory."""
    wide = rows > 128 or rows * head_dim * dtype.itemsize > 128 * 128 * 2
    return ScoreConfig(64, num_warps=8 if wide else 4, num_stages=2 if wide else 3)


PAIRED_CONFIG = ScoreConfig(64, num_warps=4, num_stages=3, programs=2, paired=True)


def fits_paired(q: Tensor, kv: Tensor, start: Tensor) -> bool:
    """Whether the paired kernels take these inputs: several prefixes of one list per head."""
    rows = q.shape[1] * q.shape[2] // start.shape[1]
    return _PAIRED_ROWS[0] // 2 < rows <= _PAIRED_ROWS[-1] and _pairable(q, kv, start)


def _pairable(q: Tensor, kv: Tensor, start: Tensor) -> bool:
    """``fits_paired`` for a suitable number of probes."""
    return (
        q.is_cuda
        and len(q) > 1
        and start.stride(0) == 0
        and q.dtype == kv.dtype
        and kv.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] in _PAIRED_HEAD_DIMS
        and _has_paired(q.device)
    )


@functools.cache
def _has_paired(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        importlib.import_module("tca_kernels.gluon.score")
    except (ImportError, AttributeError) as error:
        # Gluon is young: its names change between versions of Triton.
        logger.warning("scoring without its Hopper kernels, which need Triton 3.6: %s", error)
        return False
    return True


def _probes_at_once(q: Tensor, kv: Tensor, start: Tensor, config: ScoreConfig | None) -> int:
    """Probes whose rows one matrix product takes, all products about equally many."""
    # Float32 operands are split into three parts, which need shared memory of their own.
    query_bytes = 32768 if kv.dtype == torch.float32 else 65536
    rows = min(query_bytes // (q.shape[3] * kv.dtype.itemsize), 256)
    if config is None and _pairable(q, kv, start):
        rows = min(rows, _PAIRED_ROWS[-1])
    most = max(rows // (q.shape[2] // start.shape[1]), 1)
    return cdiv(q.shape[1], cdiv(q.shape[1], most))


def probe_scores(
    q: Tensor,
    kv: Tensor,
    arena: Tensor,
    start: Tensor,
    lengths: Tensor,
    counts: Tensor,
    scale: float,
    config: ScoreConfig | None = None,
) -> Tensor:
    r"""Score the first ``counts`` entries of every list with the probe queries that end it.

    ``s_j = mean_{i, g} softmax_j(scale * q[i, g] . K_j)`` over probes ``i`` and the query heads
    ``g`` of the KV head (the paper's importance, with several probes). A list ends with the
    probes' own tokens: probe ``i`` of ``P`` sees its first ``length - P + 1 + i`` entries, all of
    which count in its softmax, scored or not.

    Parameters
    ----------
    q : ``[N, P, Hq, D]``; last dimension contiguous. An item ``n`` is one selection: a request,
        or one sub-chunk of it. Neighbouring items whose lists are prefixes of one another share
        their reads.
    kv : ``[num_slots, 2, D]``, contiguous
    arena : int32 ``[A]``, contiguous
    start : int64 ``[N, Hkv]``, on the device, any strides
    lengths : ``[N, Hkv]``, integer, **on the host**; at least ``P`` each
    counts : ``[N, Hkv]``, integer, **on the host**; at most the length each
    scale : usually ``D ** -0.5``
    config : replaces the tuned default

    Returns
    -------
    float32 ``[sum(counts)]``, lists in the order of ``counts.flatten()``.

    Raises
    ------
    ValueError
        If a list is shorter than the probes or than its count, or a table is on the device.
    """
    tables = ScoreTables.build(lengths, counts, q.device)
    return probe_scores_by_tables(q, kv, arena, start, tables, scale, config)


def probe_scores_by_tables(
    q: Tensor,
    kv: Tensor,
    arena: Tensor,
    start: Tensor,
    tables: ScoreTables,
    scale: float,
    config: ScoreConfig | None = None,
) -> Tensor:
    """``probe_scores`` with its tables on the device already.

    Uploads others the first time if the probes are more than one matrix product takes.

    Raises
    ------
    ValueError
        If a list is shorter than the probes.
    """
    check_pool(kv, q.shape[-1])
    check_lists(arena=arena)
    probes = q.shape[1]
    if tables.shortest < probes:
        raise ValueError("every list must hold its probes' tokens")
    if not dispatch.use_triton(q):
        return reference.probe_scores(q, kv, arena, start, tables.lengths, tables.counts, scale)
    step = _probes_at_once(q, kv, start, config)
    if probes <= step:
        return _score_triton(q, kv, arena, start, tables, scale, config)
    total = torch.zeros(tables.num_scores, dtype=torch.float32, device=q.device)
    for first in range(0, probes, step):
        part = q[:, first : first + step]
        # Earlier probes see a prefix of the list.
        seen = tables.shortened(probes - first - part.shape[1])
        score = _score_triton(part, kv, arena, start, seen, scale, config)
        total.add_(score, alpha=part.shape[1] / probes)
    return total


def _score_triton(
    q: Tensor,
    kv: Tensor,
    arena: Tensor,
    start: Tensor,
    tables: ScoreTables,
    scale: float,
    config: ScoreConfig | None,
) -> Tensor:
    from tca_kernels.triton.score import probe_merge_kernel

    items, probes, num_q_heads, head_dim = q.shape
    num_heads = start.shape[1]
    pairs = items * num_heads
    group = num_q_heads // num_heads
    rows = max(16, next_power_of_2(probes * group))
    if config is None:
        paired = fits_paired(q, kv, start)
        config = PAIRED_CONFIG if paired else default_config(rows, head_dim, kv.dtype)
    if config.paired:
        rows = max(rows, _PAIRED_ROWS[0])
    groups = cdiv(items, 2) if config.paired else items
    chunk = _chunk(tables.longest, groups * num_heads, config, q.device)
    num_chunks = cdiv(tables.longest, chunk)

    table = tables.table
    scores = torch.empty(tables.num_scores, dtype=torch.float32, device=q.device)
    partial = torch.empty(num_chunks, pairs, rows, dtype=torch.float32, device=q.device)
    lse = torch.empty(pairs, rows, dtype=torch.float32, device=q.device)
    queries = (q, q.stride(0), q.stride(1), q.stride(2))
    sizes = (scale * math.log2(math.e), items, num_heads, chunk)
    shape = {"PROBES": probes, "GROUP": group, "ROWS": rows, "D": head_dim, "BLOCK": config.block}
    (first, first_launch), (second, second_launch) = _kernels(config, rows)
    strides = start.stride()[1:] if config.paired else start.stride()
    lists = (kv, arena, start, *strides, table)
    programs = groups * num_heads
    first[(programs, num_chunks)](*queries, *lists, partial, *sizes, **shape, **first_launch)
    probe_merge_kernel[(pairs,)](partial, table, lse, pairs, chunk, ROWS=rows, BLOCK=_MERGE_BLOCK)
    second[(programs, cdiv(tables.most_scores, chunk))](
        *queries, *lists, lse, scores, *sizes, **shape, **second_launch
    )
    return scores


def _kernels(
    config: ScoreConfig, rows: int
) -> tuple[tuple[Any, dict[str, int]], tuple[Any, dict[str, int]]]:
    """The kernels of both passes, each with its launch options."""
    if config.paired:
        from tca_kernels.gluon import score as paired

        # Logits have a row per probe in the first pass, per key in the second; a warp takes 16.
        first, second = (
            {"num_warps": min(config.num_warps, n // 16), "STAGES": config.num_stages}
            for n in (rows, config.block)
        )
        return (paired.paired_lse_kernel, first), (paired.paired_weights_kernel, second)
    from tca_kernels.triton import score as single

    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return (single.probe_lse_kernel, launch), (single.probe_weights_kernel, launch)


def _chunk(longest: int, lists: int, config: ScoreConfig, device: torch.device) -> int:
    """Slots per program: whole rounds of programs, but enough slots to repay a program's start."""
    sms = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
    chunks = max(sms * config.programs // lists, 1)
    return min(max(cdiv(cdiv(longest, chunks), config.block), 8), 128) * config.block
