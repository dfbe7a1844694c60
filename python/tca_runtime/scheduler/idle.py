"""What happens when nobody asks for anything."""

from __future__ import annotations

import time

from tca_runtime.cache.manager import CacheManager

# Quiet times after which the cache is checked: its counters, then the owner of every slot.
COUNTERS_CHECK_SECONDS = 1.0
SLOTS_CHECK_SECONDS = 60.0


class IdleTime:
    """How long nothing was to be done; checks the cache meanwhile.

    Counters once per idle time, and every slot when it lasts.
    """

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache
        self._since = time.monotonic()
        self._checked = 2

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self._since

    def note(self, is_idle: bool) -> None:
        """Take what this iteration of the loop is."""
        if not is_idle:
            self._since = time.monotonic()
            self._checked = 0
        elif self._checked == 0 and self.seconds >= COUNTERS_CHECK_SECONDS:
            self._cache.check(every_slot=False)
            self._checked = 1
        elif self._checked == 1 and self.seconds >= SLOTS_CHECK_SECONDS:
            self._cache.check()
            self._checked = 2
