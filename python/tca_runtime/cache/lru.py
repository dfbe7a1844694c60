"""Oldest-first queue of radix nodes with lazily corrected time stamps."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tca_runtime.cache.radix_tree import RadixNode


class LruQueue:
    """Nodes that qualify for something, the least recently used first.

    A node is queued at most once. Using it does not touch the queue: on its turn a node that was
    used since is queued again with its new stamp, and one that no longer qualifies is dropped.
    So whoever makes a node qualify must ``offer`` it, and nobody needs to take it back.
    """

    def __init__(self, qualifies: Callable[[RadixNode], bool]) -> None:
        self._qualifies = qualifies
        self._heap: list[tuple[int, int, RadixNode]] = []
        self._queued: set[RadixNode] = set()
        self._order = itertools.count()

    def __contains__(self, node: RadixNode) -> bool:
        return node in self._queued

    def qualifies(self, node: RadixNode) -> bool:
        return self._qualifies(node)

    def offer(self, node: RadixNode) -> None:
        """Queue a node if it qualifies and is not queued."""
        if node not in self._queued and self._qualifies(node):
            self._queued.add(node)
            heapq.heappush(self._heap, (node.last_access, next(self._order), node))

    def pop(self) -> RadixNode | None:
        """Take the oldest node that qualifies, if there is one."""
        while self._heap:
            stamp, _, node = heapq.heappop(self._heap)
            self._queued.remove(node)
            if not self._qualifies(node):
                continue
            if node.last_access == stamp:
                return node
            self.offer(node)
        return None
