"""Stop strings and stop patterns in text that arrives in pieces.

The text is read character by character: the first character that completes a stop ends it, and of
several stops completed by the same character the one that began first counts. So neither the
result nor what may be shown early depends on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from time import perf_counter

import regex

from tca_runtime.sampling_params import SamplingParams
from tca_runtime.tokenizer.errors import RequestError

MAX_STOPS = 32
# Compiling a pattern of this length takes 10 ms at most, whatever it says.
MAX_PATTERN_LENGTH = 256
# Of one call with all its prompts: they are prepared while other clients wait.
MAX_CALL_PATTERNS = 32
MAX_CALL_STOP_CHARACTERS = 1 << 18

# A pattern may use this much time per character, saved up to the limit. Typical ones need 1 %.
_SECONDS_PER_CHARACTER = 200e-6
_MAX_SECONDS = 0.1


@lru_cache(maxsize=1024)
def _borders(stop: str) -> tuple[int, ...]:
    """Per prefix, the length of its longest proper prefix that also ends it."""
    shorter = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = shorter[length - 1]
        length += stop[i] == stop[length]
        shorter[i] = length
    return tuple(shorter)


class _StopString:
    """Knuth-Morris-Pratt: ``held`` is the length of the longest prefix that ends the text."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.held = 0
        self._shorter = _borders(stop)

    def advance(self, text: str, end: int) -> int | None:
        char = text[end - 1]
        while self.held and self.stop[self.held] != char:
            self.held = self._shorter[self.held - 1]
        self.held += self.stop[self.held] == char
        return end - self.held if self.held == len(self.stop) else None


class _StopPattern:
    """A regular expression; no match can begin before ``_begin``."""

    def __init__(self, pattern: str, compiled: regex.Pattern[str]) -> None:
        self.stop = pattern
        self.held = 0
        self._compiled = compiled
        self._begin = 0
        self._seconds = _MAX_SECONDS

    def skip(self, length: int) -> None:
        self._begin += length

    def advance(self, text: str, end: int) -> int | None:
        self._seconds = min(self._seconds + _SECONDS_PER_CHARACTER, _MAX_SECONDS)
        match = self._search(text, end, partial=False)
        if match is not None:
            return int(match.start())
        match = self._search(text, end, partial=True)
        self._begin = match.start() if match is not None else end
        self.held = end - self._begin
        return None

    def _search(self, text: str, end: int, partial: bool) -> regex.Match[str] | None:
        started = perf_counter()
        try:
            return self._compiled.search(
                text, self._begin, end, partial=partial, timeout=max(self._seconds, 1e-3)
            )
        except TimeoutError:
            raise RequestError(
                f"stop_regex {self.stop!r} takes too long to match", param="stop_regex"
            ) from None
        finally:
            self._seconds -= perf_counter() - started


class StopChecker:
    """Watches one output for its stops.

    Parameters
    ----------
    strings, patterns : stop strings (no empty ones) and compiled stop patterns by their source.
    keep_stop : whether the stop itself belongs to the text.
    """

    def __init__(
        self,
        strings: tuple[str, ...],
        patterns: dict[str, regex.Pattern[str]],
        keep_stop: bool,
    ) -> None:
        self._patterns = [_StopPattern(p, c) for p, c in patterns.items()]
        self._stops: list[_StopString | _StopPattern] = [
            *(_StopString(s) for s in strings),
            *self._patterns,
        ]
        self._keep_stop = keep_stop
        self._text = ""
        self._released = 0
        self.matched: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to watch for."""
        return not self._stops

    def feed(self, piece: str, armed: bool = True) -> str:
        """Add text and return what is now certain to be output.

        An unarmed piece is output as it is and is never part of a stop.

        Raises
        ------
        RequestError
            If a pattern takes too long.
        """
        if not self._stops:
            return piece
        begin = len(self._text)
        self._text += piece
        if not armed:
            for pattern in self._patterns:
                pattern.skip(len(piece))
            self._released = len(self._text)
            return piece
        for end in range(begin + 1, len(self._text) + 1):
            found = self._advance(end)
            if found is not None:
                start, self.matched = found
                return self._release(end if self._keep_stop else start)
        held = max(stop.held for stop in self._stops)
        return self._release(len(self._text) - held)

    def flush(self) -> str:
        """The output has ended without a stop: return what was held back."""
        return self._release(len(self._text))

    def _advance(self, end: int) -> tuple[int, str] | None:
        best: tuple[int, str] | None = None
        for stop in self._stops:
            start = stop.advance(self._text, end)
            if start is not None and (best is None or start < best[0]):
                best = (start, stop.stop)
        return best

    def _release(self, end: int) -> str:
        piece = self._text[self._released : end]
        self._released = max(self._released, end)
        return piece


def check_call(samplings: Iterable[SamplingParams]) -> None:
    """Refuse a call whose stops, each within its limits, are too many together.

    Raises
    ------
    RequestError
        Naming the limit.
    """
    strings: set[str] = set()
    patterns: set[str] = set()
    for sampling in samplings:
        strings.update(sampling.stop)
        patterns.update(sampling.stop_regex)
    if sum(map(len, strings)) > MAX_CALL_STOP_CHARACTERS:
        text = f"a call may have {MAX_CALL_STOP_CHARACTERS} characters of stop strings at most"
        raise RequestError(text, param="stop")
    if len(patterns) > MAX_CALL_PATTERNS:
        text = f"a call may have {MAX_CALL_PATTERNS} different stop patterns at most"
        raise RequestError(text, param="stop_regex")


def compile_patterns(sources: tuple[str, ...]) -> dict[str, regex.Pattern[str]]:
    """Compile stop patterns.

    Raises
    ------
    RequestError
        If a pattern is invalid, too long, or stops before the first character.
    """
    compiled: dict[str, regex.Pattern[str]] = {}
    for source in sources:
        if len(source) > MAX_PATTERN_LENGTH:
            raise RequestError(
                f"stop_regex has {len(source)} characters, the limit is {MAX_PATTERN_LENGTH}",
                param="stop_regex",
            )
        try:
            pattern = regex.compile(source)
            empty = pattern.search("", timeout=_MAX_SECONDS)
        except (regex.error, TimeoutError, RecursionError) as error:
            raise RequestError(
                f"stop_regex {source!r} is invalid: {error}", param="stop_regex"
            ) from None
        if empty is not None:
            raise RequestError(f"stop_regex {source!r} matches the empty text", param="stop_regex")
        compiled[source] = pattern
    return compiled
