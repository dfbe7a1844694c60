"""No request waits, or runs, for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from tca_runtime.config import SchedulerArgs
from tca_runtime.messages import FinishReason
from tca_runtime.scheduler.request import Request

# How often the clock is compared with every request.
CHECK_SECONDS = 0.05


class Deadlines:
    """Marks requests that are over their time; the scheduler ends them like any other."""

    def __init__(self, args: SchedulerArgs) -> None:
        self._queue = args.queue_timeout
        self._total = args.request_timeout
        self._next_check = 0.0

    def mark(self, active: Callable[[], Iterable[Request]]) -> None:
        """Set ``finish`` where a limit is passed; cheap enough for every step."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_SECONDS
        for request in active():
            if request.finish is None:
                request.finish = self._expiry(request, now - request.arrived_at)

    def _expiry(self, request: Request, age: float) -> FinishReason | None:
        if self._total and age > self._total:
            text = f"the request was not finished in {self._total:g} s (--request-timeout)"
            return FinishReason("abort", message=text, status=504)
        if self._queue and request.admitted_at is None and age > self._queue:
            text = f"the request waited {self._queue:g} s without being admitted (--queue-timeout)"
            return FinishReason("abort", message=text, status=503)
        return None
