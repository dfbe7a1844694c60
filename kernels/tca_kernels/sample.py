"""Drawing tokens from rows of scores: the nucleus, and an argmax under Gumbel noise.

Both look at whole vocabularies once per token, as a dozen tensor operations would many times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tca_kernels import dispatch, reference
from tca_kernels.dispatch import cdiv, check_lists, next_power_of_2

# (tokens per step of a program, warps)
_NUCLEUS_TILE = (8192, 16)
_DRAW_TILE = (4096, 8)


def keep_top_p(scores: Tensor, p: Tensor, tile: tuple[int, int] = _NUCLEUS_TILE) -> None:
    """Keep each row's smallest set of best tokens whose probabilities sum to ``p``, in place.

    The others become -inf. A cut-off in probability decides, so equal scores stay or go together,
    and a row's best token always stays. It is found by bisection, without an order of the tokens.

    Parameters
    ----------
    scores : float32 ``[N, V]``, contiguous
    p : float32 ``[N, 1]``, positive; above 1 everything stays
    tile : tokens per step of a program, and its warps
    """
    check_lists(scores=scores, p=p)
    if not dispatch.use_triton(scores):
        reference.keep_top_p(scores, p)
        return
    from tca_kernels.triton.sample import nucleus_kernel

    rows, width = scores.shape
    if rows:
        nucleus_kernel[(rows,)](
            scores,
            scores.softmax(-1),
            p,
            width,
            TILE=min(tile[0], next_power_of_2(width)),
            num_warps=tile[1],
        )


def gumbel_argmax(scores: Tensor, keys: Tensor, tile: tuple[int, int] = _DRAW_TILE) -> Tensor:
    """Draw a token per row: the largest score after Gumbel noise was added.

    Parameters
    ----------
    scores : float32 ``[N, V]``, contiguous
    keys : int32 ``[N, 2]``, what a row's noise is a function of (``reference.gumbel_noise``)
    tile : tokens per program, and its warps

    Returns
    -------
    int64 ``[N]``, valid tokens even where scores are NaN
    """
    check_lists(scores=scores, keys=keys)
    rows, width = scores.shape
    if not dispatch.use_triton(scores):
        return (scores + reference.gumbel_noise(keys, width)).argmax(-1)
    from tca_kernels.triton.sample import best_kernel, noisy_best_kernel

    size = min(tile[0], next_power_of_2(width))
    parts = cdiv(width, size)
    best = torch.empty(rows, parts, dtype=torch.float32, device=scores.device)
    places = torch.empty(rows, parts, dtype=torch.int64, device=scores.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=scores.device)
    if rows:
        noisy_best_kernel[(rows, parts)](
            scores, keys, best, places, width, TILE=size, num_warps=tile[1]
        )
        best_kernel[(rows,)](best, places, tokens, parts, TILE=next_power_of_2(parts))
    return tokens
