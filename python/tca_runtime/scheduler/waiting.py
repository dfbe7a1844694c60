"""Requests that wait for admission, and who goes first."""

from __future__ import annotations

from collections.abc import Iterator

from tca_runtime.cache.manager import CacheManager
from tca_runtime.cache.radix_tree import PrefixMatch
from tca_runtime.scheduler.request import Request

# Only the oldest requests are ranked by prefix, which bounds the work of one scheduling step.
RANKED = 128
# A request passed by this often goes before any longer prefix.
MAX_SKIPS = 32


class WaitingQueue:
    """Waiting requests in order of arrival, offered by policy.

    ``lpm`` offers the longest cached prefix first, so that prefixes are used before they are
    evicted; ``fcfs`` keeps to arrival. Priorities come before either, requests that were skipped
    ``MAX_SKIPS`` times before the rest of their priority.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request; a retracted one returns to its place by arrival."""
        at = len(self._requests)
        while at and self._requests[at - 1].arrival > request.arrival:
            at -= 1
        self._requests.insert(at, request)

    def remove(self, requests: set[Request]) -> None:
        self._requests = [r for r in self._requests if r not in requests]

    def ranked(self, cache: CacheManager) -> list[Request]:
        """The candidates for admission, best first."""
        ready = [r for r in self._requests if r.grammar is None]
        candidates = ready[:RANKED]
        if self._policy == "fcfs":
            return sorted(candidates, key=lambda r: (-r.message.priority, r.arrival))
        cached = {r: find_prefix(cache, r).num_tokens for r in candidates}
        return sorted(
            candidates,
            key=lambda r: (-r.message.priority, r.skipped < MAX_SKIPS, -cached[r], r.arrival),
        )


def find_prefix(cache: CacheManager, request: Request) -> PrefixMatch:
    """The cached prefix this request may use."""
    return cache.match(request.namespace, request.tokens[: request.reusable_tokens])
