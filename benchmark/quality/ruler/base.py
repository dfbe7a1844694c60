"""What a task gives, and how its size is fitted to a length in tokens."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Draft:
    """A prompt before chat markup: the user's text, and how the answer is made to begin."""

    user: str
    prefix: str
    answers: list[list[str]]


class RulerTask(ABC):
    """Builds prompts whose haystack has a size, in units of the task's own.

    Attributes
    ----------
    max_new_tokens : the paper's limit of the output
    step : units by which a prompt that came out too long is made shorter
    """

    max_new_tokens: int
    step: int

    @abstractmethod
    def build(self, rng: random.Random, size: int, short: bool) -> Draft:
        """One prompt with ``size`` units of haystack; ``short`` for lengths below 4096 tokens."""


def fitted(
    task: RulerTask, seed: str, limit: int, count_tokens: Callable[[Draft], int], size: int
) -> Draft:
    """The prompt of ``seed`` that just fits ``limit`` tokens, starting from a typical ``size``.

    Raises
    ------
    ValueError
        When not even the smallest prompt fits.
    """
    size += size // 8
    while size > 0:
        draft = task.build(random.Random(seed), size, limit < 4096 - 512)
        tokens = count_tokens(draft)
        if tokens <= limit:
            return draft
        size = min(size - task.step, size * limit // tokens)
    raise ValueError(f"{type(task).__name__} does not fit {limit} tokens")


def largest_size(
    task: RulerTask, seed: str, limit: int, count_tokens: Callable[[Draft], int]
) -> int:
    """The haystack size whose prompt just fits ``limit`` tokens, by bisection."""

    def tokens(size: int) -> int:
        return count_tokens(task.build(random.Random(seed), size, limit < 4096 - 512))

    low, high = task.step, 2 * task.step
    while (reached := tokens(high)) <= limit:
        # A task may run out of material; its prompts then stop growing.
        if high > 16 * task.step and reached == tokens(low):
            break
        low, high = high, 2 * high
    while high - low > max(1, task.step // 8):
        middle = (low + high) // 2
        if tokens(middle) <= limit:
            low = middle
        else:
            high = middle
    return low
