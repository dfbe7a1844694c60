"""Log-probabilities of sampled and prompt tokens, from logits as the model gives them.

They are those of temperature 1 before any penalty, bias, filter or grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_runtime.engine.step import LogprobWish, PositionLogprobs
from tca_runtime.engine.upload import download, upload

# Bounds the logits of a long prompt that exist at one time.
PROMPT_SLICE = 256


@dataclass(frozen=True)
class PendingLogprobs:
    """Results as the device computes them, and how to read them.

    Attributes
    ----------
    ids : int64 ``[N, 1 + k + a]``: the target, the k best, the ids asked for
    values : float32, their logprobs
    num_top : k
    wishes : what each row wants of them
    """

    ids: Tensor
    values: Tensor
    num_top: int
    wishes: Sequence[LogprobWish]

    def download(self) -> PendingLogprobs:
        """The same on the host, to be read once the stream has got there."""
        return replace(self, ids=download(self.ids), values=download(self.values))

    def entries(self) -> list[PositionLogprobs]:
        """Convert, one entry per row.

        ``top`` lists a row's ``top_k`` best tokens, best first, then the ids it asked for, in
        its order.
        """
        entries = []
        first_asked = 1 + self.num_top
        table = zip(self.wishes, self.ids.tolist(), self.values.tolist(), strict=True)
        for wish, ids, values in table:
            pairs = list(zip(values, ids, strict=True))
            best = pairs[1:first_asked][: wish.top_k]
            asked = pairs[first_asked:][: len(wish.token_ids)]
            entries.append(PositionLogprobs(pairs[0], best + asked))
        return entries


def token_logprobs(
    logits: Tensor, targets: Tensor, wishes: Sequence[LogprobWish]
) -> PendingLogprobs:
    """Logprobs of one target per row, and of what its wish names besides.

    Parameters
    ----------
    logits : float32 ``[N, V]``, not modified
    targets : int64 ``[N]``
    """
    num_rows, vocab_size = logits.shape
    num_top = min(max(wish.top_k for wish in wishes), vocab_size)
    num_asked = max(len(wish.token_ids) for wish in wishes)
    ids = [targets[:, None]]
    if num_top:
        ids.append(logits.topk(num_top).indices)
    if num_asked:
        # Padded with id 0: reading cuts each row to the ids that it asked for.
        asked = np.zeros((num_rows, num_asked), dtype=np.int64)
        for row, wish in enumerate(wishes):
            asked[row, : len(wish.token_ids)] = wish.token_ids
        ids.append(upload(torch.from_numpy(asked), logits.device))
    columns = torch.cat(ids, dim=1)
    values = logits.gather(1, columns) - logits.logsumexp(-1, keepdim=True)
    return PendingLogprobs(columns, values, num_top, wishes)


def prompt_logprobs(
    project: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: NDArray[np.int32],
    wish: LogprobWish,
) -> list[PendingLogprobs]:
    """Logprobs of prompt tokens, a slice of positions at a time.

    Parameters
    ----------
    project : from hidden states ``[n, H]`` to float32 logits ``[n, V]``
    hidden : ``[N, H]``, the states that predict ``targets``
    targets : N token ids
    """
    ids = upload(torch.from_numpy(targets.astype(np.int64)), hidden.device)
    return [
        token_logprobs(project(states), part, [wish] * len(part))
        for states, part in zip(
            torch.split(hidden, PROMPT_SLICE), torch.split(ids, PROMPT_SLICE), strict=True
        )
    ]
