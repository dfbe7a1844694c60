"""FlashInfer's list of work for FA3, changed so that KV heads are sequences without copies.

FlashInfer plans for sequences that lie end to end: every entry of its list is a tile of queries,
with the row where its sequence begins, a query head and a row of keys. For KV heads as sequences
it is asked to plan packed rows; the entries are then pointed at the tokens in their usual layout
``[T, Hq, D]``, which costs nothing, where packing copies all queries and results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

Table = NDArray[np.int32]
# A plan's tables by their place in its list of offsets. Those with a value per entry: its tile,
# where its queries and keys begin, how many they are, its query head, and its sequence's number;
# the other one: where the entries of each CTA begin.
_, QUERY_ROW, KEY_ROW, _, _, HEAD, CTA_BEGIN, SEQUENCE = range(8)


def point_at_tokens(
    wrapper: BatchPrefillWithRaggedKVCacheWrapper,
    starts: NDArray[np.int64],
    heads: int,
    group: int,
    rows: int,
) -> bool:
    """Change the plan that was just made for rows ordered by piece, KV head and token.

    Parameters
    ----------
    starts : where each piece's tokens begin
    heads, group : KV heads, each of them a sequence of every piece, and the query heads of one
    rows : tokens of the queries that the plan will run with

    Returns
    -------
    False, with nothing changed, if the plan is not such a list: FA2's, or one of very many rows.
    """
    offsets = list(wrapper._plan_info)
    if wrapper._backend != "fa3" or len(offsets) != 9 or offsets[-1]:
        return False
    pinned = wrapper._pin_memory_int_workspace_buffer
    tables: Table = pinned.numpy().view(np.int32)

    def table(which: int, size: int) -> Table:
        begin = offsets[which] // tables.itemsize
        return tables[begin : begin + size]

    device = wrapper.device
    num_ctas = torch.cuda.get_device_properties(device).multi_processor_count
    size = int(table(CTA_BEGIN, num_ctas + 1)[-1])
    sequence, query_head = table(SEQUENCE, size), table(HEAD, size)
    if not size or sequence.max() != len(starts) * heads - 1 or query_head.max() != group - 1:
        # Another version's list, which must not be changed.
        return False
    piece, head = np.divmod(sequence, heads)
    table(QUERY_ROW, size)[:] = starts[piece]
    table(KEY_ROW, size)[:] -= head
    query_head += head * group
    used = offsets[SEQUENCE] + size * tables.itemsize
    wrapper._int_workspace_buffer[:used].copy_(pinned[:used], non_blocking=True)
    wrapper._qo_indptr_last = rows
    return True


def by_head(rows: Tensor, heads: int) -> Tensor:
    """Keys or values ``[N, D]`` as ``[N - Hkv + 1, Hkv, D]``, a head one row behind the other.

    So all heads reach all rows; the list's first rows are lower by the head's number.
    """
    width = rows.shape[1]
    return rows.as_strided((len(rows) - heads + 1, heads, width), (width, width, 1))
