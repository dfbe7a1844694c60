"""Oldest-first queue of radix nodes with lazily corrected time stamps."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tca_runtime.cache.radix_tree import RadixNode

# Void entries that may stay, besides as many as are queued, before the heap is made anew.
VOID_ENTRIES = 64


class LruQueue:
    """Nodes that qualify for something, the least recently used first.

    A node is queued at most once. Using it does not touch the queue: on its turn a node that was
    used since is queued again with its new stamp, and one that no longer qualifies is dropped.
    So whoever makes a node qualify must ``offer`` it, and nobody needs to take it back.
    """

    def __init__(self, qualifies: Callable[[RadixNode], bool]) -> None:
        self._qualifies = qualifies
        self._heap: list[tuple[int, int, RadixNode]] = []
        # The number of each queued node's entry; other entries in the heap are void.
        self._queued: dict[RadixNode, int] = {}
        self._order = itertools.count()

    def __contains__(self, node: RadixNode) -> bool:
        return node in self._queued

    def qualifies(self, node: RadixNode) -> bool:
        return self._qualifies(node)

    def offer(self, node: RadixNode) -> None:
        """Queue a node if it qualifies and is not queued."""
        if node not in self._queued and self._qualifies(node):
            self._queued[node] = next(self._order)
            heapq.heappush(self._heap, (node.last_access, self._queued[node], node))

    def pop(self) -> RadixNode | None:
        """Take the oldest node that qualifies, if there is one."""
        while self._heap:
            stamp, number, node = heapq.heappop(self._heap)
            if self._queued.get(node) != number:
                continue
            del self._queued[node]
            if not self._qualifies(node):
                continue
            if node.last_access == stamp:
                return node
            self.offer(node)
        return None

    def discard(self, node: RadixNode) -> None:
        """Forget a node that is gone: a queue that nobody pops must not keep it alive."""
        self._queued.pop(node, None)
        if len(self._heap) > 2 * len(self._queued) + VOID_ENTRIES:
            self._heap = [entry for entry in self._heap if self._queued.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
