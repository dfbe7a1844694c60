"""How much of a prompt a step may compute while other requests decode."""

from __future__ import annotations

from tca_runtime.config import SchedulerArgs

# Smaller chunks cost more than they hide: weights are read once per step.
MIN_CHUNK = 32
# Share of a new measurement in the running average.
_SMOOTHING = 0.2
# The budget grows slowly, so that it seldom overshoots: the longest gaps are what clients notice.
_GROWTH = 1.25
_SHRINKAGE = 0.5


class PrefillPace:
    """A budget of prompt tokens per step, steered by the times that steps took.

    A step that decodes and prefills should take at most ``max_decode_slowdown`` times one that only
    decodes, so that prompts that arrive slow running streams down by no more than that. The budget
    begins small and follows what mixed steps took: neither is their time proportional to their
    tokens, nor does it follow from that of steps of another kind.
    """

    def __init__(self, args: SchedulerArgs, device: str = "cpu") -> None:
        self._largest = args.chunk_on(device)
        self._slowdown = args.max_decode_slowdown
        self._budget = float(min(MIN_CHUNK, self._largest))
        self._decode_seconds: float | None = None

    def budget(self, num_decode: int) -> int:
        """Prompt tokens for a step in which ``num_decode`` requests decode."""
        if not self._slowdown or not num_decode:
            return self._largest
        return int(self._budget)

    def record(self, num_decode: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        if not num_decode:
            return
        if not num_prompt_tokens:
            old = self._decode_seconds
            self._decode_seconds = seconds if old is None else old + _SMOOTHING * (seconds - old)
        elif self._decode_seconds is not None:
            self._steer(num_prompt_tokens, seconds - self._decode_seconds)

    def _steer(self, num_prompt_tokens: int, seconds: float) -> None:
        """Take a mixed step that was ``seconds`` longer than a decode step."""
        assert self._decode_seconds is not None
        spare = (self._slowdown - 1) * self._decode_seconds
        fits = num_prompt_tokens * spare / seconds if seconds > 0 else float("inf")
        if num_prompt_tokens < int(self._budget) <= fits:
            # There was not enough to compute to tell whether more would have fitted.
            return
        wanted = min(max(fits, self._budget * _SHRINKAGE), self._budget * _GROWTH)
        self._budget = min(max(wanted, float(MIN_CHUNK)), float(self._largest))
