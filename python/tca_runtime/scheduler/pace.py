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
# Share of a new measurement in a running average.
_SMOOTHING = 0.2
# The budget grows slowly, so that it seldom overshoots: the longest gaps are what clients notice.
_GROWTH = 1.25
_SHRINKAGE = 0.5
# Twice the tokens are worth a step that takes this much longer.
_WORTHWHILE = 4 / 3
# How many streams that go on a prompt that waits is worth, and how far that raises the budget.
_PROMPT_WEIGHT = 2
_MOST_RAISED = 8.0
# Measurements of an octave before the next one is tried.
_TRIALS = 4
# Mixed steps after which what a size of chunk took is forgotten: prompts and batches change.
_MEMORY = 256


class ChunkTimes:
    """What mixed steps took beyond a decode step, by the octave of their prompt tokens."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds: dict[int, float] = {}
        self._measured: dict[int, int] = {}
        self._counts: dict[int, int] = {}

    def add(self, num_tokens: int, seconds: float) -> None:
        octave = num_tokens.bit_length() - 1
        self._steps += 1
        for old in [o for o, step in self._measured.items() if step < self._steps - _MEMORY]:
            del self._seconds[old], self._measured[old], self._counts[old]
        before = self._seconds.get(octave, seconds)
        self._seconds[octave] = before + _SMOOTHING * (seconds - before)
        self._measured[octave] = self._steps
        self._counts[octave] = self._counts.get(octave, 0) + 1

    @property
    def worthwhile(self) -> int:
        """Tokens up to which a larger chunk costs little: there a step's fixed cost prevails.

        One octave more than is known, if all that are known are worthwhile: it has to be tried.
        What is below the smallest that raised budgets allow may never be measured.
        """
        least, most = (int(n).bit_length() - 1 for n in (MIN_CHUNK, MIN_CHUNK * _MOST_RAISED))
        known = (o for o in range(least, most + 1) if self._counts.get(o, 0) >= _TRIALS)
        octave = next(known, least)
        while self._counts.get(octave, 0) >= _TRIALS:
            limit = _WORTHWHILE * self._seconds[octave]
            if self._seconds.get(octave + 1, 0.0) > limit:
                break
            octave += 1
        return 1 << octave


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
    a step of decoding is one captured graph, a mixed one is launched kernel by kernel. Smaller
    chunks do not help then, they only draw the slow time out; so chunks are not made smaller there
    than where their size begins to matter.
    """

    def __init__(self, args: SchedulerArgs, device: str = "cpu") -> None:
        self._largest = args.chunk_on(device)
        self._slowdown = args.max_decode_slowdown
        self._budget = float(min(MIN_CHUNK, self._largest))
        self._decode_steps: deque[float] = deque(maxlen=_DECODE_STEPS)
        self._times = ChunkTimes() if device == "cuda" else None

    def budget(self, num_decode: int, num_prompts: int = 0) -> int:
        """Prompt tokens for a step in which ``num_decode`` requests decode.

        ``num_prompts`` requests wait for their first token.
        """
        if not self._slowdown or not num_decode:
            return self._largest
        return min(int(self._budget * _raised(num_decode, num_prompts)), self._largest)

    def spare(self, num_decode: int, num_prompts: int = 0) -> float:
        """Seconds of other work for a step in which ``num_decode`` requests decode."""
        if not self._slowdown or not num_decode:
            return math.inf
        return self._spare * _raised(num_decode, num_prompts)

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
        if self._times is not None:
            self._times.add(num_prompt_tokens, seconds)
            fits = max(fits, float(self._times.worthwhile))
        if num_prompt_tokens < int(self._budget) <= fits:
            # There was not enough to compute to tell whether more would have fitted.
            return
        wanted = min(max(fits, self._budget * _SHRINKAGE), self._budget * _GROWTH)
        self._budget = min(max(wanted, float(MIN_CHUNK)), float(self._largest))


def _raised(num_decode: int, num_prompts: int) -> float:
    return min(max(1.0, _PROMPT_WEIGHT * num_prompts / num_decode), _MOST_RAISED)
