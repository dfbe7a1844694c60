"""How much of a prompt a step may compute while other requests decode."""

from __future__ import annotations

import math
import statistics
from collections import deque

from tca_runtime.config import SchedulerArgs

# Smaller chunks cost more than they hide: weights are read once per step.
MIN_CHUNK = 32
# Latest steps that only decoded, whose median is what such a step takes.
_DECODE_STEPS = 9
# The budget grows slowly, so that it seldom overshoots: the longest gaps are what clients notice.
_GROWTH = 1.25
_SHRINKAGE = 0.5
# How many streams that go on a prompt that waits is worth, and how far that raises the budget.
_PROMPT_WEIGHT = 2
_MOST_RAISED = 8.0
# Tokens of which a layer takes about half as long on a GPU as a step that decodes, whatever the
# model: both grow with its size.
LAYERED_TOKENS = 2048


class PrefillPace:
    """A budget of prompt tokens per step, steered by the times that steps took.

    A step that decodes and prefills should take at most ``max_decode_slowdown`` times one that only
    decodes, so that prompts that arrive slow running streams down by no more than that. The budget
    begins small and follows what mixed steps took: neither is their time proportional to their
    tokens, nor does it follow from that of steps of another kind.

    That protects many streams from a few prompts. Where prompts pile up before few streams, it
    would keep everybody waiting: steps that decode little cost as much as those that decode a lot,
    and small chunks more than large ones. So the budget is raised then, in proportion.

    On a GPU prompt tokens also cost something once per step, which alone can exceed the allowance:
    a step of decoding is one captured graph, a mixed one is launched kernel by kernel. So steps are
    not mixed there, and a few layers of a chunk run between two of decoding (``LayeredPrefill``).

    Attributes
    ----------
    is_layered : whether all prompts are computed like that while others decode
    """

    def __init__(self, args: SchedulerArgs, device: str = "cpu") -> None:
        self._largest = args.chunk_on(device)
        self._slowdown = args.max_decode_slowdown
        self._budget = float(min(MIN_CHUNK, self._largest))
        self._decode_steps: deque[float] = deque(maxlen=_DECODE_STEPS)
        self.is_layered = device == "cuda"
        self._part_seconds: dict[int, float] = {}

    def budget(self, num_decode: int, num_prompts: int = 0) -> int:
        """Prompt tokens to begin with in a step in which ``num_decode`` requests decode.

        ``num_prompts`` requests wait for their first token.
        """
        if not self._slowdown or not num_decode:
            return self._largest
        budget = LAYERED_TOKENS if self.is_layered else self._budget
        return min(int(budget * _raised(num_decode, num_prompts)), self._largest)

    def spare(self, num_decode: int, num_prompts: int = 0) -> float:
        """Seconds of other work for a step in which ``num_decode`` requests decode."""
        if not self._slowdown or not num_decode:
            return math.inf
        return self._spare * _raised(num_decode, num_prompts)

    def part_seconds(self, num_tokens: int) -> float | None:
        """What a layer of about as many tokens took last; None if that is not known.

        A CPU's parts depend more on what is before them.
        """
        return self._part_seconds.get(num_tokens.bit_length()) if self.is_layered else None

    def note_part(self, num_tokens: int, seconds: float) -> None:
        """Remember ``part_seconds``."""
        self._part_seconds[num_tokens.bit_length()] = seconds

    def beyond_decode(self, seconds: float) -> float:
        """How much longer a step took than one that only decodes."""
        return max(0.0, seconds - self._decode_seconds)

    def record(self, num_decode: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        if not num_decode:
            return
        if not num_prompt_tokens:
            self._decode_steps.append(seconds)
        elif self._decode_steps:
            self._steer(num_prompt_tokens, seconds - self._decode_seconds)

    @property
    def _decode_seconds(self) -> float:
        """What a step that only decodes takes, 0 before the first.

        The median: a mean of a few steps follows single slow ones, which a busy machine has.
        """
        return statistics.median(self._decode_steps) if self._decode_steps else 0.0

    @property
    def _spare(self) -> float:
        return (self._slowdown - 1) * self._decode_seconds

    def _steer(self, num_prompt_tokens: int, seconds: float) -> None:
        """Take a mixed step that was ``seconds`` longer than a decode step."""
        fits = num_prompt_tokens * self._spare / seconds if seconds > 0 else float("inf")
        if num_prompt_tokens < int(self._budget) <= fits:
            # There was not enough to compute to tell whether more would have fitted.
            return
        wanted = min(max(fits, self._budget * _SHRINKAGE), self._budget * _GROWTH)
        self._budget = min(max(wanted, float(MIN_CHUNK)), float(self._largest))


def _raised(num_decode: int, num_prompts: int) -> float:
    return min(max(1.0, _PROMPT_WEIGHT * num_prompts / num_decode), _MOST_RAISED)
