"""The cross-check itself, against presses written here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.quality.kvpress_check import WINDOW, Case, agreement


class MeanAttention:
    """SnapKV's score: mean over the window, smoothed, averaged over the group."""

    def score(
        self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attentions: Tensor, _: Any
    ) -> Tensor:
        mean = F.avg_pool1d(attentions[..., :-WINDOW].mean(-2), 5, stride=1, padding=2)
        heads = module.config.num_key_value_heads
        grouped = mean.view(1, heads, -1, mean.shape[-1]).mean(2)
        return F.pad(grouped, (0, WINDOW))


class LeastAttention(MeanAttention):
    def score(self, *args: Any) -> Tensor:
        return -super().score(*args)


def test_the_same_method_keeps_the_same_tokens() -> None:
    case = Case.random(3, tokens=512 + WINDOW)
    assert agreement(case, "snapkv", MeanAttention(), [0.1, 0.4]) == [1.0, 1.0]


def test_another_method_does_not() -> None:
    case = Case.random(3, tokens=512 + WINDOW)
    assert max(agreement(case, "snapkv", LeastAttention(), [0.1, 0.4])) < 0.1
    assert agreement(case, "streaming", MeanAttention(), [0.4])[0] < 0.6


def test_both_keep_as_many_tokens() -> None:
    case = Case.random(5, tokens=512 + WINDOW)
    for chosen in (case.ours("keydiff", 100), case.theirs(MeanAttention(), 100)):
        assert torch.equal(chosen.sum(1), torch.tensor([100, 100]))
