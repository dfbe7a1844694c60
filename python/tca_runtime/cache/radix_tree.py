"""Prefix tree over token ids whose nodes hold per-head slot lists.

Tokens are counted for matching, slots for memory; the two are separate. The tree never frees a
slot: what leaves it is returned to the caller, who owns the pool.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tca_runtime.cache.head_slots import HeadSlots

Tokens = NDArray[np.int32]


class RadixNode:
    """A run of tokens after its parent's. ``locks`` counts handles at or below it."""

    __slots__ = ("children", "hits", "last_access", "locks", "parent", "queued", "tokens", "value")

    def __init__(self, tokens: Tokens, value: HeadSlots | None, parent: RadixNode | None) -> None:
        self.tokens = tokens
        self.value = value
        self.parent = parent
        self.children: dict[int, RadixNode] = {}
        self.locks = 0
        self.last_access = 0
        self.hits = 0
        self.queued = False

    @property
    def slots(self) -> HeadSlots:
        assert self.value is not None, "a root holds no slots"
        return self.value

    @property
    def is_root(self) -> bool:
        return self.value is None


@dataclass(frozen=True)
class PrefixMatch:
    """The longest cached prefix of a token sequence: a look, which changes nothing.

    ``node`` is the deepest node touched and ``offset`` how many of its tokens match.
    """

    num_tokens: int
    node: RadixNode
    offset: int


@dataclass(frozen=True)
class PrefixHandle:
    """A locked prefix: while it is held, no slot of its path is evicted."""

    num_tokens: int
    node: RadixNode


class RadixTree:
    """Radix tree with one root per namespace, lock counts and least-recently-used eviction.

    Unlocked leaves wait in a heap with lazily corrected time stamps, so eviction touches only
    what it removes. A path's last access is never older than its children's.
    """

    def __init__(self) -> None:
        self._roots: dict[str, RadixNode] = {}
        self._heap: list[tuple[int, int, RadixNode]] = []
        self._clock = itertools.count(1)
        self._order = itertools.count()
        self.num_tokens = 0
        self.num_slots = 0
        self.locked_slots = 0

    @property
    def evictable_slots(self) -> int:
        return self.num_slots - self.locked_slots

    def match(self, namespace: str, tokens: Tokens) -> PrefixMatch:
        """Find the longest cached prefix of ``tokens`` in O(its length)."""
        node = self._root(namespace)
        offset = matched = 0
        while matched < len(tokens):
            child = node.children.get(int(tokens[matched]))
            if child is None:
                break
            node = child
            offset = _common_prefix(child.tokens, tokens[matched:])
            matched += offset
            if offset < len(child.tokens):
                break
        return PrefixMatch(matched, node, offset)

    def lock(self, match: PrefixMatch) -> PrefixHandle:
        """Lock a match just made (no change of the tree in between); splits at its end."""
        node = match.node
        if not node.is_root and match.offset < len(node.tokens):
            node = self._split(node, match.offset)
        now = next(self._clock)
        for step in _path(node):
            if step.locks == 0:
                self.locked_slots += step.slots.num_slots
            step.locks += 1
            step.last_access = now
        node.hits += 1
        return PrefixHandle(match.num_tokens, node)

    def unlock(self, handle: PrefixHandle) -> None:
        for step in _path(handle.node):
            step.locks -= 1
            if step.locks == 0:
                self.locked_slots -= step.slots.num_slots
                self._offer(step)

    def slots_of(self, handle: PrefixHandle) -> list[HeadSlots]:
        """The slot lists along a locked path, root first."""
        return [node.slots for node in _path(handle.node)][::-1]

    def insert(self, namespace: str, tokens: Tokens, value: HeadSlots) -> list[HeadSlots]:
        """Add ``value``, which covers the end of ``tokens``; the tree takes its slots.

        ``tokens[: value.begin]`` must be in the tree already. What the tree holds of the rest
        stays as it is, and the slots offered for it are returned: the caller keeps them.
        """
        if value.end != len(tokens):
            raise ValueError(f"slots end at {value.end}, tokens at {len(tokens)}")
        match = self.match(namespace, tokens)
        if match.num_tokens < value.begin:
            raise ValueError(f"prefix of {value.begin} tokens is not cached")
        if match.num_tokens == len(tokens):
            return [value] if value.num_tokens else []
        parent = match.node
        if not parent.is_root and match.offset < len(parent.tokens):
            parent = self._split(parent, match.offset)
        duplicate, fresh = value.split(match.num_tokens)
        node = RadixNode(tokens[match.num_tokens :].copy(), fresh, parent)
        parent.children[int(node.tokens[0])] = node
        now = next(self._clock)
        for step in _path(node):
            step.last_access = now
        self.num_tokens += len(node.tokens)
        self.num_slots += fresh.num_slots
        self._offer(node)
        return [duplicate] if duplicate.num_tokens else []

    def evict(self, num_slots: int) -> list[HeadSlots]:
        """Remove at least ``num_slots`` slots, oldest unlocked leaves first, tails before heads.

        Returns what was removed; less than asked only when nothing more is evictable.
        """
        removed: list[HeadSlots] = []
        wanted = num_slots
        while wanted > 0 and self._heap:
            stamp, _, node = heapq.heappop(self._heap)
            node.queued = False
            if not self._is_evictable_leaf(node):
                continue
            if node.last_access > stamp:
                self._offer(node)
                continue
            per_token = max(1, node.slots.num_slots // len(node.tokens))
            tail = -(-wanted // per_token)
            if tail < len(node.tokens):
                self._split(node, len(node.tokens) - tail)
            removed.append(node.slots)
            wanted -= node.slots.num_slots
            self._remove(node)
        return removed

    def nodes(self) -> Iterator[RadixNode]:
        """Every node but the roots; for checks and reports, not for the hot path."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if not node.is_root:
                yield node

    def check(self) -> None:
        """Raise AssertionError when counters or structure are inconsistent."""
        tokens = slots = locked = 0
        for node in self.nodes():
            tokens += len(node.tokens)
            slots += node.slots.num_slots
            locked += node.slots.num_slots if node.locks else 0
            assert node.slots.num_tokens == len(node.tokens) > 0
            assert node.locks >= sum(child.locks for child in node.children.values())
            assert node.parent is not None
            assert node.parent.children[int(node.tokens[0])] is node
            assert node.parent.is_root or node.parent.slots.end == node.slots.begin
            assert node.queued or not self._is_evictable_leaf(node)
        assert (tokens, slots) == (self.num_tokens, self.num_slots), "tree counters drifted"
        assert locked == self.locked_slots, "lock counters drifted"

    def _root(self, namespace: str) -> RadixNode:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = RadixNode(np.empty(0, np.int32), None, None)
        return root

    def _split(self, node: RadixNode, offset: int) -> RadixNode:
        """Cut a node in two; ``node`` stays the lower part, the upper one is returned."""
        assert node.parent is not None
        head, tail = node.slots.split(node.slots.begin + offset)
        upper = RadixNode(node.tokens[:offset], head, node.parent)
        upper.locks = node.locks
        upper.last_access = node.last_access
        upper.hits = node.hits
        node.parent.children[int(upper.tokens[0])] = upper
        node.tokens, node.value, node.parent = node.tokens[offset:], tail, upper
        upper.children[int(node.tokens[0])] = node
        return upper

    def _is_evictable_leaf(self, node: RadixNode) -> bool:
        return not (node.is_root or node.locks or node.children or node.parent is None)

    def _offer(self, node: RadixNode) -> None:
        if not node.queued and self._is_evictable_leaf(node):
            node.queued = True
            heapq.heappush(self._heap, (node.last_access, next(self._order), node))

    def _remove(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[int(node.tokens[0])]
        node.parent = None
        self.num_tokens -= len(node.tokens)
        self.num_slots -= node.slots.num_slots
        self._offer(parent)


def _path(node: RadixNode) -> Iterator[RadixNode]:
    """From ``node`` up to, not including, its root."""
    step: RadixNode | None = node
    while step is not None and not step.is_root:
        yield step
        step = step.parent


def _common_prefix(left: Tokens, right: Tokens) -> int:
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size
