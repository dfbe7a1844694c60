"""From importances to kept entries: block scores, budget ranks, per-block top-k, compaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tca_kernels import dispatch, reference
from tca_kernels.dispatch import cdiv, check_lists, host_table, upload

BlockScore = Literal["raw-hhi", "normalised-hhi", "mass"]

_SCORE_TILE = 32
_RANK_TILE = 64
_SUM_TILE = 1024


@dataclass(frozen=True)
class Selection:
    """What a selection keeps, per row.

    Attributes
    ----------
    indices : int32 ``[kept]``, places within a row's candidates, ascending in each row
    indptr : int64 ``[R + 1]`` on the host; row ``r`` keeps ``indices[indptr[r] : indptr[r + 1]]``
    dropped_mass : float32 ``[R]``, summed importance of the row's candidates that are not kept
    """

    indices: Tensor
    indptr: Tensor
    dropped_mass: Tensor


@dataclass(frozen=True, eq=False)
class SelectTables:
    """How many blocks of each row keep how much, with what the kernels read of it.

    Attributes
    ----------
    row_blocks : int64 ``[R]`` on the host
    levels : entries kept per block at each of the ``K`` levels
    num_blocks, longest : blocks of all rows and of the longest one
    row_bounds : int32 ``[R + 1]`` on the device, where each row's blocks begin
    level_sizes : int32 ``[K]`` on the device, ``levels``
    level_counts : int64 ``[R, K]`` on the host
    level_stops : int32 ``[R, K]`` on the device, running sums of ``level_counts``
    indptr : int64 ``[R + 1]`` on the host, as in ``Selection``
    num_kept : entries kept of all rows
    """

    row_blocks: Tensor
    levels: tuple[int, ...]
    num_blocks: int
    longest: int
    row_bounds: Tensor
    level_sizes: Tensor
    level_counts: Tensor
    level_stops: Tensor
    indptr: Tensor
    num_kept: int

    @staticmethod
    def build(
        row_blocks: Tensor, level_counts: Tensor, levels: tuple[int, ...], device: torch.device
    ) -> list[SelectTables]:
        """Tables of ``L`` selections from rows of the same blocks, in one upload.

        Parameters
        ----------
        row_blocks : ``[R]``, integer, on the host
        level_counts : ``[L, R, K]``, integer, on the host; each row sums to ``row_blocks``
        levels : ``K`` sizes

        Raises
        ------
        ValueError
            If counts and blocks do not agree, or a table is on the device.
        """
        row_blocks = host_table(row_blocks, "row_blocks")
        level_counts = host_table(level_counts, "level_counts")
        if not torch.equal(level_counts.sum(2), row_blocks.expand(len(level_counts), -1)):
            raise ValueError("level_counts must distribute exactly the blocks of each row")
        sizes = torch.tensor(levels)
        indptr = F.pad((level_counts * sizes).sum(2).cumsum(1), (1, 0))
        bounds = F.pad(row_blocks.cumsum(0), (1, 0))
        stops = level_counts.cumsum(2)
        table = upload(torch.cat((bounds, sizes, stops.flatten())).to(torch.int32), device)
        row_bounds, level_sizes, level_stops = table.split(
            (bounds.numel(), sizes.numel(), stops.numel())
        )
        longest = int(row_blocks.max()) if len(row_blocks) else 0
        shared = (row_blocks, levels, int(bounds[-1]), longest, row_bounds, level_sizes)
        per_layer = zip(
            level_counts,
            level_stops.view_as(stops),
            indptr,
            indptr[:, -1].tolist(),
            strict=True,
        )
        return [SelectTables(*shared, *own) for own in per_layer]


def block_scores(scores: Tensor, block: int, kind: BlockScore = "raw-hhi") -> Tensor:
    r"""Score every block of candidates.

    ``raw-hhi``: ``h_B = sum_{j in B} s_j^2``; ``normalised-hhi``: the same of ``s`` normalised to
    sum one inside the block (0 for a block without mass); ``mass``: ``sum_{j in B} s_j``.

    Parameters
    ----------
    scores : float32 ``[n]``, contiguous; ``n`` a multiple of ``block``. Rows may follow one
        another, since every row is made of whole blocks.
    block : tokens per block, a power of two

    Returns
    -------
    float32 ``[n / block]``.
    """
    if scores.numel() % block:
        raise ValueError(f"{scores.numel()} scores are not whole blocks of {block}")
    if kind not in get_args(BlockScore):
        raise ValueError(f"block score {kind!r} is none of {', '.join(get_args(BlockScore))}")
    check_lists(scores=scores)
    if not dispatch.use_triton(scores):
        return reference.block_scores(scores, block, kind)
    from tca_kernels.triton.select import block_score_kernel

    num_blocks = scores.numel() // block
    out = torch.empty(num_blocks, dtype=torch.float32, device=scores.device)
    if num_blocks:
        block_score_kernel[(cdiv(num_blocks, _SCORE_TILE),)](
            scores,
            out,
            num_blocks,
            KIND=kind,
            BLOCK=block,
            TILE=_SCORE_TILE,
        )
    return out


def select(
    scores: Tensor,
    block_score: Tensor,
    row_blocks: Tensor,
    level_counts: Tensor,
    levels: tuple[int, ...],
    *,
    descending: bool = False,
) -> Selection:
    """Keep in every block as many of its best entries as its rank among the row's blocks earns.

    The blocks of a row are sorted by ``block_score``; the first ``level_counts[r, 0]`` keep
    ``levels[0]`` entries each, the next ``level_counts[r, 1]`` keep ``levels[1]``, and so on (the
    paper's budget ``p_k``). Ties go to the lower index, among blocks and among entries, so the
    result is a function of the inputs on every device, and its size one of the counts alone.

    Parameters
    ----------
    scores : float32 ``[n]``, contiguous; rows follow one another, each of whole blocks
    block_score : float32 ``[n / block]``, contiguous
    row_blocks : ``[R]``, integer, **on the host**: blocks of each row
    level_counts : ``[R, len(levels)]``, integer, **on the host**; each row sums to ``row_blocks``
    levels : entries kept per block at each level, at most the block's size
    descending : the highest block scores come first in the ranking, instead of the lowest

    Raises
    ------
    ValueError
        If counts, blocks and scores do not agree, or a table is on the device.
    """
    (tables,) = SelectTables.build(row_blocks, level_counts[None], levels, scores.device)
    return select_by_tables(scores, block_score, tables, descending=descending)


def select_by_tables(
    scores: Tensor, block_score: Tensor, tables: SelectTables, *, descending: bool = False
) -> Selection:
    """``select`` with its tables on the device already.

    Raises
    ------
    ValueError
        If the tables are of another number of blocks.
    """
    if tables.num_blocks != block_score.numel():
        raise ValueError(f"{tables.num_blocks} blocks, but {block_score.numel()} block scores")
    check_lists(scores=scores, block_score=block_score)
    if not block_score.numel():
        nothing = torch.empty(0, dtype=torch.int32, device=scores.device)
        dropped = torch.zeros(len(tables.row_blocks), device=scores.device)
        return Selection(nothing, tables.indptr, dropped)
    if dispatch.use_triton(scores):
        indices, dropped = _select_triton(scores, block_score, tables, descending)
    else:
        indices, dropped = reference.select(
            scores, block_score, tables.row_blocks, tables.level_counts, tables.levels, descending
        )
    return Selection(indices, tables.indptr, dropped)


def _select_triton(
    scores: Tensor, block_score: Tensor, tables: SelectTables, descending: bool
) -> tuple[Tensor, Tensor]:
    from tca_kernels.triton.select import block_budget_kernel, block_topk_kernel, row_sum_kernel

    device = scores.device
    num_rows, num_blocks = len(tables.row_blocks), tables.num_blocks
    block = scores.numel() // num_blocks
    keep = torch.empty(num_blocks, dtype=torch.int32, device=device)
    block_budget_kernel[(num_rows, cdiv(tables.longest, _RANK_TILE))](
        block_score,
        tables.row_bounds,
        tables.level_stops,
        tables.level_sizes,
        keep,
        LEVELS=len(tables.levels),
        DESCENDING=descending,
        TILE=_RANK_TILE,
        num_warps=2,
    )
    keep_end = keep.cumsum(0, dtype=torch.int32)
    indices = torch.empty(tables.num_kept, dtype=torch.int32, device=device)
    dropped = torch.empty(num_blocks, dtype=torch.float32, device=device)
    tile = max(1, 4096 // (block * block))
    # One warp: ranks then need no exchange through shared memory (70 us against 240 on an H200).
    block_topk_kernel[(num_rows, cdiv(tables.longest, tile))](
        scores,
        keep,
        keep_end,
        tables.row_bounds,
        indices,
        dropped,
        BLOCK=block,
        TILE=tile,
        num_warps=1,
    )
    row_dropped = torch.empty(num_rows, dtype=torch.float32, device=device)
    row_sum_kernel[(num_rows,)](dropped, tables.row_bounds, row_dropped, TILE=_SUM_TILE)
    return indices, row_dropped
