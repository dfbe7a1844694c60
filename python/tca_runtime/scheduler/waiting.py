"""Requests that wait for admission, and who goes first."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from tca_runtime.cache.manager import CacheManager
from tca_runtime.cache.radix_tree import PrefixMatch
from tca_runtime.messages import FinishReason
from tca_runtime.scheduler.fairness import FairShares
from tca_runtime.scheduler.request import Request

# Only so many requests are ranked by prefix, which bounds the work of one scheduling step.
RANKED = 128
# A request passed by this often goes before any longer prefix.
MAX_SKIPS = 32


class WaitingQueue:
    """Waiting requests in order of arrival, offered by policy.

    ``lpm`` offers the longest cached prefix first, so that prefixes are used before they are
    evicted; ``fcfs`` keeps to arrival. Priorities come before either, then fair shares between
    clients; within them, requests that were skipped ``MAX_SKIPS`` times go first.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._requests: list[Request] = []
        self._shares = FairShares()

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
        self._shares.enter(request)

    def displace(self, client: str, priority: int) -> bool:
        """Give a place in a full queue to ``client``, if somebody else should make room.

        That is the newest request of the lowest priority, if that is lower than ``priority``; and
        otherwise of the client with most requests of that priority, if it has two more than
        ``client`` would have. So nobody can shut others out by filling the queue.
        """
        # Not those that were retracted: their clients have begun to read.
        open_requests = [r for r in self._requests if r.finish is None and r.admitted_at is None]
        lowest = min((r.message.priority for r in open_requests), default=priority)
        if lowest > priority:
            return False
        places = Counter(r.client for r in open_requests if r.message.priority == lowest)
        holder, most = max(places.items(), key=lambda item: item[1], default=("", 0))
        if lowest == priority and most < places[client] + 2:
            return False
        victim = next(
            r
            for r in reversed(open_requests)
            if r.client == holder and r.message.priority == lowest
        )
        text = "the queue is full, and another request has a better claim to a place in it"
        victim.finish = FinishReason("abort", message=text, status=503)
        return True

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return sum(r.finish is None for r in self._requests)

    def admit(self, request: Request, missing: int) -> None:
        """Note that a request begins, with ``missing`` tokens to compute; it is removed later."""
        if request.admitted_at is None:
            request.admitted_at = time.monotonic()
        self._shares.admit(request, missing)

    def remove(self, requests: set[Request]) -> None:
        """Forget requests: admitted ones, and all that have ended, wherever they were."""
        for request in requests:
            if request.finish is not None:
                self._shares.settle(request)
        gone = [r for r in self._requests if r in requests]
        if gone:
            self._requests = [r for r in self._requests if r not in requests]
        for request in gone:
            self._shares.leave(request)

    def ranked(self, cache: CacheManager) -> list[Request]:
        """The candidates for admission, best first."""
        ready = [r for r in self._requests if r.grammar is None]
        candidates = self._shares.candidates(ready, RANKED)
        prefixes: dict[Request, int] = {}

        def cached(request: Request) -> int:
            if request not in prefixes:
                prefixes[request] = find_prefix(cache, request).num_tokens
            return prefixes[request]

        def key(request: Request) -> tuple[int, bool, int, int]:
            priority, patient = -request.message.priority, request.skipped < MAX_SKIPS
            prefers = cached(request) if self._policy == "lpm" else 0
            return priority, patient, -prefers, request.arrival

        return self._shares.order(candidates, key, lambda r: r.num_tokens - cached(r))

    def uncached_tokens(self, cache: CacheManager) -> int:
        """Prompt tokens that the waiting requests would have to compute.

        Of a long queue only the oldest requests are looked up; the rest counts in full.
        """
        found = sum(find_prefix(cache, r).num_tokens for r in self._requests[:RANKED])
        return sum(r.num_tokens for r in self._requests) - found


def find_prefix(cache: CacheManager, request: Request) -> PrefixMatch:
    """The cached prefix this request may use."""
    return cache.match(request.namespace, request.tokens[: request.reusable_tokens])
