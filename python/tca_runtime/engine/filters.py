"""top-k, top-p among the few best, and min-p over a batch of rows, each with its own setting.

Top-p alone, over whole vocabularies, is `tca_kernels.sample.keep_top_p`.

Every filter keeps the tokens that reach a per-row cut-off and sets the others to -inf, in place.
The cut-off is a value, not a rank: equal logits stay or go together, so the order in which a sort
leaves ties never decides a draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tca_kernels.reference import largest, top_p_cutoff

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
    cutoff = top_p_cutoff(largest(logits, k_max), k, p)
    logits.masked_fill_(logits < cutoff, -torch.inf)


def keep_min_p(logits: Tensor, p: Tensor) -> None:
    """Keep tokens at least ``p`` times as likely as the best one; ``p``: float32 ``[N, 1]``."""
    logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + p.log(), -torch.inf)
