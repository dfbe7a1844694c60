"""What every configuration of a grid keeps, of one layer and one set of queries.

Selection keeps nested sets: with blocks sorted by score and a block's tokens by importance, a
configuration keeps the best 1, 2, 4, ... tokens of blocks from certain ranks on. So sums over the
kept tokens of all configurations are differences of a few running sums, exact and cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_runtime.calibration.grid import Grid
from tca_runtime.sparsity.budget import levels
from tca_runtime.sparsity.policies.tca import TCAPolicy


@dataclass(frozen=True, eq=False)
class Attended:
    """One layer's attention from some evaluation queries over a whole context.

    Attributes
    ----------
    weights : float32 ``[Hkv, E * G, T]``, softmax over what each query sees
    values : float32 ``[Hkv, T, D]``
    """

    weights: Tensor
    values: Tensor

    @staticmethod
    def compute(q: Tensor, places: Tensor, kv: Tensor, scale: float) -> Attended:
        """Attend.

        Parameters
        ----------
        q : ``[E, Hq, D]``, evaluation queries
        places : int64 ``[E]``, position of each query in the context, which it sees up to there
        kv : ``[Hkv, T, 2, D]``
        """
        keys, values = kv.float().unbind(2)
        heads, length, dim = keys.shape
        rows = q.float().view(len(q), heads, -1, dim).transpose(0, 1)
        logits = (rows.flatten(1, 2) @ keys.transpose(1, 2)) * scale
        future = torch.arange(length, device=q.device) > places[:, None]
        logits.unflatten(1, (len(q), -1)).masked_fill_(future[:, None], -torch.inf)
        return Attended(logits.softmax(-1), values)


def rank(importance: Tensor, block: int) -> Tensor:
    """Candidates in the order selection takes them: int64 ``[Hkv, blocks, block]``.

    Blocks by ascending score, tokens of a block by descending importance (``TCAPolicy``).
    """
    heads = importance.shape[0]
    blocks = TCAPolicy().block_scores(importance, block).argsort(dim=-1, stable=True)[..., None]
    inside = importance.view(heads, -1, block).argsort(dim=-1, descending=True, stable=True)
    return blocks * block + inside.gather(1, blocks.expand(-1, -1, block))


def kept_sums(weights: Tensor, values: Tensor, first_ranks: NDArray[np.int64]) -> Tensor:
    """Weighted sums of values over what each configuration keeps.

    Parameters
    ----------
    weights : ``[Hkv, R, blocks, block]``, in ``rank``'s order
    values : ``[Hkv, blocks, block, X]``, likewise
    first_ranks : ``Grid.first_ranks`` for this number of blocks

    Returns
    -------
    ``[Hkv, M, R, X]``
    """
    ends = levels(values.shape[2])
    begins = np.concatenate(([0], ends[:-1]))
    first = torch.from_numpy(first_ranks).to(values.device)
    total = values.new_zeros(())
    for level, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        part = weights[..., begin:end].transpose(1, 2) @ values[:, :, begin:end]
        # Entry r: over the blocks of rank r and above; the last entry is over none.
        above = torch.nn.functional.pad(part, (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
        total = total + above[:, first[level]]
    return total


def retained_mass(attended: Attended, order: Tensor, grid: Grid) -> Tensor:
    """Mean attention mass of what each configuration keeps, window included: ``[Hkv, M]``."""
    importance = attended.weights.mean(1)
    ranked = importance.gather(1, order.flatten(1)).view(order.shape)
    ones = torch.ones(1, device=ranked.device).expand(*ranked.shape, 1)
    kept = kept_sums(ranked[:, None], ones, grid.first_ranks(order.shape[1]))[:, :, 0, 0]
    return 1 - (kept[:, -1:] - kept)


def output_error(attended: Attended, order: Tensor, grid: Grid, projection: Tensor) -> Tensor:
    """How far each configuration of a head moves the layer's output: float32 ``[Hkv, M]``.

    ``|(att - att_S) W_o|^2`` of the KV head's query heads together, relative to ``|att W_o|^2``
    of the whole layer, both summed over the evaluation queries.

    Parameters
    ----------
    projection : ``[Hq * D, hidden]``, the layer's output projection
    """
    weights, values = attended.weights, attended.values
    heads, rows, _ = weights.shape
    dim = values.shape[-1]
    projection = projection.float().view(heads, -1, projection.shape[-1])
    group = projection.shape[1] // dim
    index = order.flatten(1)
    ranked = weights.gather(2, index[:, None].expand(-1, rows, -1)).view(
        heads, rows, *order.shape[1:]
    )
    # A column of ones sums the weights beside the weighted values.
    extended = torch.nn.functional.pad(values, (0, 1), value=1.0)
    ordered = extended.gather(1, index[..., None].expand(-1, -1, dim + 1))
    kept = kept_sums(ranked, ordered.view(*order.shape, -1), grid.first_ranks(order.shape[1]))
    full = (weights @ extended)[:, None]
    kept = full - (kept[:, -1:] - kept)
    moved = full[..., :dim] - kept[..., :dim] / kept[..., dim:]
    moved = moved.reshape(heads, grid.size, rows // group, group * dim)
    error = (moved.flatten(1, 2) @ projection).square().sum(-1).view(heads, grid.size, -1).sum(-1)
    output = (full[:, 0, :, :dim].reshape(heads, -1, group * dim) @ projection).sum(0)
    return error / output.square().sum()
