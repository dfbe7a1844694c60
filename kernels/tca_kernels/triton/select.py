# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Block scores, budget ranks, per-block top-k and compaction.

Scores and blocks are flat over rows (a row is one (item, KV head) pair); ``row_ptr`` holds each
row's first block and, at the end, their number.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_blocks"])
def block_score_kernel(
    score_ptr, out_ptr, num_blocks, KIND: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = block < num_blocks
    offset = block.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    score = tl.load(score_ptr + offset, mask=valid[:, None], other=0.0)
    mass = tl.sum(score, axis=1)
    if KIND == "mass":
        out = mass
    else:
        out = tl.sum(score * score, axis=1)
        if KIND == "normalised-hhi":
            out = tl.where(mass > 0, out / (mass * mass), 0.0)
    tl.store(out_ptr + block, out, mask=valid)


@triton.jit
def _sort_keys(score_ptr, block, num_blocks, DESCENDING: tl.constexpr):
    """Scores as int32 that sort like them (or reversed); beyond the row's end, the largest."""
    valid = block < num_blocks
    score = tl.load(score_ptr + block, mask=valid, other=0.0)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    if DESCENDING:
        key = ~key
    return tl.where(valid, key, 0x7FFFFFFF)


@triton.jit(do_not_specialize_on_alignment=["row_ptr", "stop_ptr", "level_ptr"])
def block_budget_kernel(
    block_score_ptr,
    row_ptr,
    stop_ptr,
    level_ptr,
    keep_ptr,
    LEVELS: tl.constexpr,
    DESCENDING: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rank every block within its row (ties: lower index first) and look its budget up.

    ``stop[row, i]`` is the first rank beyond level ``i``, whose blocks keep ``level[i]`` tokens.
    Ranks are found by counting: quadratic in a row's blocks, but without a sort's many launches.
    """
    row = tl.program_id(0)
    row_start = tl.load(row_ptr + row)
    row_blocks = tl.load(row_ptr + row + 1) - row_start
    first = tl.program_id(1) * TILE
    if first >= row_blocks:
        return
    block_score_ptr += row_start
    lane = tl.arange(0, TILE)
    block = first + lane
    mine = _sort_keys(block_score_ptr, block, row_blocks, DESCENDING)
    ahead = tl.zeros([TILE, TILE], tl.int32)
    for other in range(0, row_blocks, TILE):
        theirs = _sort_keys(block_score_ptr, other + lane, row_blocks, DESCENDING)
        # An equal score goes first if its index is lower.
        bound = tl.where(other < first, mine + 1, mine)
        ahead += (theirs[None, :] < bound[:, None]).to(tl.int32)
    tied = (mine[None, :] == mine[:, None]) & (lane[None, :] < lane[:, None])
    rank = tl.sum(ahead + tied.to(tl.int32), axis=1)
    keep = tl.zeros([TILE], tl.int32)
    for i in tl.static_range(LEVELS - 1, -1, -1):
        stop = tl.load(stop_ptr + row * LEVELS + i)
        keep = tl.where(rank < stop, tl.load(level_ptr + i), keep)
    tl.store(keep_ptr + row_start + block, keep, mask=block < row_blocks)


@triton.jit(do_not_specialize_on_alignment=["row_ptr"])
def block_topk_kernel(
    score_ptr,
    keep_ptr,
    keep_end_ptr,
    row_ptr,
    index_ptr,
    dropped_ptr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the ``keep`` best entries of each block, ascending, and the mass of the others.

    ``keep_end`` is the running sum of ``keep`` over all blocks: where a block's entries end.
    """
    row = tl.program_id(0)
    row_start = tl.load(row_ptr + row)
    row_blocks = tl.load(row_ptr + row + 1) - row_start
    first = tl.program_id(1) * TILE
    if first >= row_blocks:
        return
    block = first + tl.arange(0, TILE)
    valid = block < row_blocks
    lane = tl.arange(0, BLOCK)
    offset = (row_start + block).to(tl.int64)[:, None] * BLOCK + lane[None, :]
    score = tl.load(score_ptr + offset, mask=valid[:, None], other=0.0)
    keep = tl.load(keep_ptr + row_start + block, mask=valid, other=0)
    end = tl.load(keep_end_ptr + row_start + block, mask=valid, other=0)

    # The others lie on the first axis: each thread then counts for entries of its own, and no
    # sum crosses threads.
    mine = score[:, None, :]
    theirs = score[:, :, None]
    tied = (theirs == mine) & (lane[None, :, None] < lane[None, None, :])
    rank = tl.sum(((theirs > mine) | tied).to(tl.int32), axis=1)
    kept = rank < keep[:, None]
    # NaN is ahead of nothing, so more than ``keep`` may qualify then: never write beyond them.
    order = tl.cumsum(kept.to(tl.int32), axis=1)
    kept = kept & (order <= keep[:, None])
    place = (end - keep)[:, None] + order - 1
    tl.store(index_ptr + place, block[:, None] * BLOCK + lane[None, :], mask=kept)
    dropped = tl.sum(tl.where(kept, 0.0, score), axis=1)
    tl.store(dropped_ptr + row_start + block, dropped, mask=valid)


@triton.jit(do_not_specialize_on_alignment=["row_ptr"])
def row_sum_kernel(value_ptr, row_ptr, out_ptr, TILE: tl.constexpr):
    """Sum of each row's values, in a fixed order."""
    row = tl.program_id(0)
    start = tl.load(row_ptr + row)
    stop = tl.load(row_ptr + row + 1)
    total = tl.zeros([TILE], tl.float32)
    for first in range(start, stop, TILE):
        index = first + tl.arange(0, TILE)
        total += tl.load(value_ptr + index, mask=index < stop, other=0.0)
    tl.store(out_ptr + row, tl.sum(total, axis=0))
