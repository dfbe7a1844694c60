"""top-k, top-p among the few best, and min-p over a batch of rows, each with its own setting.

Top-p alone, over whole vocabularies, is `tca_kernels.sample.keep_top_p`.

Every filter keeps the tokens that reach a per-row cut-off and sets the others to -inf, in place.
The cut-off is a value, not a rank: equal logits stay or go together, so the order in which a sort
leaves ties never decides a draw.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Not 1, which a sum of rounded probabilities may reach early.
TOP_P_OFF = 2.0


def keep_top_k_top_p(logits: Tensor, k: Tensor, p: Tensor, k_max: int) -> None:
    """Top-k, then the smallest set of best tokens that holds ``p`` of what top-k left.

    Parameters
    ----------
    logits : float32 ``[N, V]``
    k : int64 ``[N, 1]``, each in ``[1, k_max]``
    p : float32 ``[N, 1]``; `TOP_P_OFF` keeps everything that top-k keeps
    k_max : at most V
    """
    best = _best(logits, k_max)
    inside = torch.arange(k_max, device=logits.device) < k
    probs = torch.where(inside, best, -torch.inf).softmax(-1)
    better = probs.cumsum(-1) - probs
    num_kept = ((better < p) & inside).sum(-1, keepdim=True)
    # Rows of NaN keep nothing, and an index of -1 would be an error of the whole batch.
    cutoff = best.gather(1, (num_kept - 1).clamp_(min=0))
    logits.masked_fill_(logits < cutoff, -torch.inf)


def keep_min_p(logits: Tensor, p: Tensor) -> None:
    """Keep tokens at least ``p`` times as likely as the best one; ``p``: float32 ``[N, 1]``."""
    logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + p.log(), -torch.inf)


def _best(logits: Tensor, count: int) -> Tensor:
    """The ``count`` largest logits of each row, best first."""
    if logits.device.type == "cpu":
        # NumPy's vectorised sort of a whole vocabulary beats even torch's topk of a few tokens.
        ascending = torch.from_numpy(np.sort(logits.numpy(), axis=-1))
        return ascending[:, -count:].flip(-1)
    return logits.topk(count).values
