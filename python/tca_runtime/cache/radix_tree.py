"""Prefix tree over token ids whose nodes hold per-head slot lists.

Tokens are counted for matching, slots for memory; the two are separate. The tree never frees a
slot: what leaves it is returned to the caller, who owns the pools.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.lru import LruQueue

Tokens = NDArray[np.int32]


class Namespace(NamedTuple):
    """Prefixes are shared within a namespace only.

    ``prunable``: requests of it attend to selected views anyway, so its cold prefixes may shrink
    to their core context; those of requests with full attention may not.
    """

    key: str = ""
    prunable: bool = True


class RadixNode:
    """A run of tokens after its parent's.

    Attributes
    ----------
    slots : what the device holds of these tokens
    host : what was demoted to the host tier; disjoint from ``slots``
    locks : handles at or below this node
    prunable : of its namespace
    settled : nothing more of it can be pruned
    repeated : the model has repeated its tokens, so its slots' importance depends on no question
    """

    __slots__ = (
        "__weakref__",
        "children",
        "hits",
        "host",
        "last_access",
        "locks",
        "parent",
        "prunable",
        "repeated",
        "settled",
        "slots",
        "tokens",
    )

    def __init__(self, tokens: Tokens, slots: HeadSlots, parent: RadixNode | None) -> None:
        self.tokens = tokens
        self.slots = slots
        self.host: HeadSlots | None = None
        self.parent = parent
        self.children: dict[int, RadixNode] = {}
        self.locks = 0
        self.last_access = 0
        self.hits = 0
        self.prunable: bool = parent is None or parent.prunable
        self.settled = False
        self.repeated = False

    @property
    def is_leaf(self) -> bool:
        return not self.children

    @property
    def state(self) -> Literal["full", "demoted", "pruned"]:
        if self.host is not None:
            return "demoted"
        return "full" if self.slots.is_full else "pruned"


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
    """A locked prefix: while it is held, no slot of its path is taken away."""

    num_tokens: int
    node: RadixNode


class RadixTree:
    """Radix tree with one root per namespace, lock counts and least-recently-used queues.

    A path's last access is never older than its children's. The queues hold unlocked nodes only:
    ``leaves`` can be evicted, ``full`` ones can shrink, ``cores`` are what demoted nodes still
    hold on the device, ``hosted`` ones take host memory, ``unrepeated`` ones are complete leaves
    that the model might repeat before they shrink.
    """

    def __init__(self) -> None:
        self._roots: dict[Namespace, RadixNode] = {}
        self._clock = itertools.count(1)
        self.leaves = LruQueue(lambda n: self._is_idle(n) and n.is_leaf)
        self.full = LruQueue(lambda n: self._is_idle(n) and not n.settled and n.state == "full")
        self.cores = LruQueue(
            lambda n: self._is_idle(n) and n.host is not None and n.slots.num_slots > 0
        )
        self.hosted = LruQueue(lambda n: self._is_idle(n) and n.host is not None)
        self.unrepeated = LruQueue(
            lambda n: self._is_idle(n) and n.is_leaf and n.state == "full" and not n.repeated
        )
        self._queues = (self.leaves, self.full, self.cores, self.hosted, self.unrepeated)
        self.num_tokens = 0
        self.num_slots = 0
        self.num_host_slots = 0
        self.locked_slots = 0

    @property
    def evictable_slots(self) -> int:
        """Device slots of unlocked nodes."""
        return self.num_slots - self.locked_slots

    def match(self, namespace: Namespace, tokens: Tokens) -> PrefixMatch:
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

    def lock(self, match: PrefixMatch, is_use: bool = True) -> PrefixHandle:
        """Lock a match just made (no change of the tree in between); splits at its end.

        It counts as an access, by which least recently used is meant, if it ``is_use``.
        """
        node = match.node
        if match.offset < len(node.tokens):
            node = self._split(node, match.offset)
        now = next(self._clock)
        for step in _path(node):
            if step.locks == 0:
                self.locked_slots += step.slots.num_slots
            step.locks += 1
            step.last_access = now if is_use else step.last_access
        node.hits += is_use
        return PrefixHandle(match.num_tokens, node)

    def unlock(self, handle: PrefixHandle) -> None:
        for step in _path(handle.node):
            step.locks -= 1
            if step.locks == 0:
                self.locked_slots -= step.slots.num_slots
                self._offer(step)

    def path(self, handle: PrefixHandle) -> list[RadixNode]:
        """The nodes of a locked prefix, root first."""
        return self.path_to(handle.node)

    def path_to(self, node: RadixNode) -> list[RadixNode]:
        """The nodes from below the root down to ``node``."""
        return list(_path(node))[::-1]

    def namespace_of(self, node: RadixNode) -> Namespace:
        """Where a node of the tree is to be found."""
        root = node
        while root.parent is not None:
            root = root.parent
        return next(name for name, found in self._roots.items() if found is root)

    def insert(self, namespace: Namespace, tokens: Tokens, value: HeadSlots) -> list[HeadSlots]:
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
        if match.offset < len(parent.tokens):
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

    def replace(self, node: RadixNode, slots: HeadSlots, host: HeadSlots | None) -> None:
        """Change what a node holds; the caller moved or freed the slots already."""
        self._count(node, -1)
        node.slots, node.host = slots, host
        self._count(node, 1)
        self._offer(node)

    def split_tail(self, node: RadixNode, num_tokens: int) -> None:
        """Make ``node`` its own last ``num_tokens`` tokens; the rest becomes its parent."""
        self._split(node, len(node.tokens) - num_tokens)

    def remove(self, leaf: RadixNode) -> None:
        """Take an unlocked leaf out; its slots are the caller's now."""
        parent = leaf.parent
        assert parent is not None and leaf.is_leaf and not leaf.locks
        del parent.children[int(leaf.tokens[0])]
        leaf.parent = None
        for queue in self._queues:
            queue.discard(leaf)
        self.num_tokens -= len(leaf.tokens)
        self._count(leaf, -1)
        self._offer(parent)

    def nodes(self) -> Iterator[RadixNode]:
        """Every node but the roots; for checks and reports, not for the hot path."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def namespaces(self) -> dict[Namespace, RadixNode]:
        """The roots, whose children are the first runs of tokens."""
        return self._roots

    def check(self) -> None:
        """Raise AssertionError when counters or structure are inconsistent."""
        tokens = slots = hosted = locked = 0
        for node in self.nodes():
            tokens += len(node.tokens)
            slots += node.slots.num_slots
            hosted += node.host.num_slots if node.host else 0
            locked += node.slots.num_slots if node.locks else 0
            assert node.slots.num_tokens == len(node.tokens) > 0
            assert node.locks >= sum(child.locks for child in node.children.values())
            assert node.parent is not None
            assert node.parent.children[int(node.tokens[0])] is node
            assert node.parent.slots.end == node.slots.begin
            for queue in self._queues:
                assert node in queue or not queue.qualifies(node)
        assert (tokens, slots) == (self.num_tokens, self.num_slots), "tree counters drifted"
        assert hosted == self.num_host_slots, "host counters drifted"
        assert locked == self.locked_slots, "lock counters drifted"

    def _root(self, namespace: Namespace) -> RadixNode:
        root = self._roots.get(namespace)
        if root is None:
            nothing = np.empty(0, np.int32)
            root = self._roots[namespace] = RadixNode(nothing, HeadSlots.nothing(), None)
            root.prunable = namespace.prunable
        return root

    def _split(self, node: RadixNode, offset: int) -> RadixNode:
        """Cut a node in two; ``node`` stays the lower part, the upper one is returned."""
        assert node.parent is not None
        cut = node.slots.begin + offset
        head, tail = node.slots.split(cut)
        upper = RadixNode(node.tokens[:offset], head, node.parent)
        upper.locks, upper.settled, upper.repeated = node.locks, node.settled, node.repeated
        upper.last_access, upper.hits = node.last_access, node.hits
        node.parent.children[int(upper.tokens[0])] = upper
        if node.host is not None:
            upper.host, node.host = node.host.split(cut)
        node.tokens, node.slots, node.parent = node.tokens[offset:], tail, upper
        upper.children[int(node.tokens[0])] = node
        self._offer(upper)
        # A pruned node's tail may be complete where the whole was not.
        self._offer(node)
        return upper

    def _is_idle(self, node: RadixNode) -> bool:
        return not node.locks and node.parent is not None

    def _offer(self, node: RadixNode) -> None:
        for queue in self._queues:
            queue.offer(node)

    def _count(self, node: RadixNode, sign: int) -> None:
        self.num_slots += sign * node.slots.num_slots
        if node.locks:
            self.locked_slots += sign * node.slots.num_slots
        if node.host is not None:
            self.num_host_slots += sign * node.host.num_slots


def _path(node: RadixNode) -> Iterator[RadixNode]:
    """From ``node`` up to, not including, its root."""
    while node.parent is not None:
        yield node
        node = node.parent


def _common_prefix(left: Tokens, right: Tokens) -> int:
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size
