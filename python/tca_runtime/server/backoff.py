"""When clients that were turned away should come back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

# Seconds that what happened is looked back upon.
WINDOW = 10.0
# Bounds of the answer, in seconds.
SHORTEST, LONGEST = 1, 60


class Backoff:
    """Tells refused clients to wait until as many requests have ended as were refused of late.

    If all of them come back at once there is room for about all of them.

    Parameters
    ----------
    clock : seconds, from any point on
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque()
        self._refusals: deque[float] = deque()

    def note_end(self) -> None:
        """A request was answered."""
        self._ends.append(self._clock())
        self._forget()

    def refuse(self) -> int:
        """A request is refused for now: the seconds to tell its client."""
        self._refusals.append(self._clock())
        self._forget()
        if not self._ends:
            return math.ceil(WINDOW)
        seconds = len(self._refusals) * WINDOW / len(self._ends)
        return min(max(math.ceil(seconds), SHORTEST), LONGEST)

    def _forget(self) -> None:
        begin = self._clock() - WINDOW
        for times in (self._ends, self._refusals):
            while times and times[0] < begin:
                times.popleft()
