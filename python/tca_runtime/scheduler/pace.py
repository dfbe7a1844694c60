"""How much of a prompt a step may compute while other requests decode."""

from __future__ import annotations

from tca_runtime.config import SchedulerArgs

# Smaller chunks cost more than they hide: weights are read once per step.
MIN_CHUNK = 32
# Share of a new measurement in the running averages.
_SMOOTHING = 0.2


class PrefillPace:
    """A budget of prompt tokens per step, from the times that steps took.

    A step that decodes and prefills should take at most ``max_decode_slowdown`` times one that only
    decodes, so that prompts that arrive slow running streams down by no more than that. Before
    anything is known of either, the smallest chunk is tried.
    """

    def __init__(self, args: SchedulerArgs) -> None:
        self._largest = args.chunked_prefill_size
        self._slowdown = args.max_decode_slowdown
        self._decode_seconds: float | None = None
        self._token_seconds: float | None = None

    def budget(self, num_decode: int) -> int:
        """Prompt tokens for a step in which ``num_decode`` requests decode."""
        if not self._slowdown or not num_decode:
            return self._largest
        if self._decode_seconds is None or self._token_seconds is None:
            return min(MIN_CHUNK, self._largest)
        spare = (self._slowdown - 1) * self._decode_seconds
        tokens = int(spare / self._token_seconds) if self._token_seconds else self._largest
        return min(max(tokens, MIN_CHUNK), self._largest)

    def record(self, num_decode: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        if num_decode and not num_prompt_tokens:
            self._decode_seconds = _average(self._decode_seconds, seconds)
        elif num_prompt_tokens:
            decode = (self._decode_seconds or 0.0) if num_decode else 0.0
            per_token = max(seconds - decode, 0.0) / num_prompt_tokens
            self._token_seconds = _average(self._token_seconds, per_token)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
