"""Making room: demote, then prune, then evict."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.radix_tree import RadixNode, RadixTree
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.cache.transfer import Transfers

logger = logging.getLogger(__name__)


class CoreChooser(Protocol):
    """Decides what of a complete run of tokens is its core context."""

    def __call__(self, slots: HeadSlots, importance: Tensor) -> Tensor | None:
        """Bool ``[num_slots]``, True for the core; None when nothing can be dropped.

        ``importance`` is float32 ``[num_slots]``, in the order of ``slots.slots``.
        """
        ...


@dataclass
class ReclaimCounts:
    """Slots that left the device, by what became of them."""

    demoted: int = 0
    pruned: int = 0
    evicted: int = 0
    promoted: int = 0


class Reclaimer:
    """Frees device slots of cold prefixes, losing as little as possible.

    Oldest first, step by step: complete nodes give up all but their core context (to the host
    tier if there is one, for good otherwise), then demoted nodes give up their core too, then
    leaves are evicted, tails before heads.

    Parameters
    ----------
    host : second pool, in host memory; None for none
    choose_core : None keeps nodes complete until they are demoted whole or evicted
    choose_repeated : ``choose_core`` of nodes whose tokens the model has repeated; the same if None
    may_prune : whether slots may be dropped for good while their node stays
    transfers : carries slots between the tiers
    headroom : device slots to have free ahead of need, so that demotion runs beside the steps
        before the one that wants the room
    """

    def __init__(
        self,
        tree: RadixTree,
        pool: SlotPool,
        host: SlotPool | None = None,
        choose_core: CoreChooser | None = None,
        may_prune: bool = True,
        *,
        choose_repeated: CoreChooser | None = None,
        transfers: Transfers,
        headroom: int = 0,
    ) -> None:
        self._tree = tree
        self._pool = pool
        self.host = host
        self.choose_core = choose_core
        self.choose_repeated = choose_repeated
        self._may_prune = may_prune
        self._transfers = transfers
        self._headroom = headroom
        self.counts = ReclaimCounts()

    def make_room(self, num_slots: int) -> None:
        """Have ``num_slots`` free on the device, or as many as unlocked prefixes give."""
        if self.choose_core is not None or self.host is not None:
            while self._pool.num_free < num_slots and (node := self._tree.full.pop()):
                self._shrink(node)
            while self._pool.num_free < num_slots and (node := self._tree.cores.pop()):
                if not self._demote(node, node.slots, None):
                    self._tree.cores.offer(node)
                    break
        while self._pool.num_free < num_slots and (node := self._tree.leaves.pop()):
            self._evict(node, num_slots - self._pool.num_free)
        if self.host is not None and self._pool.num_free < num_slots + self._headroom:
            self._demote_ahead(num_slots + self._headroom)

    def shrink_all(self) -> None:
        """Reduce every unlocked prefix to its core, as if memory were short."""
        while node := self._tree.full.pop():
            self._shrink(node)

    def evict_all(self) -> None:
        """Remove every unlocked prefix."""
        while node := self._tree.leaves.pop():
            self._evict(node, None)

    def promote(self, nodes: Sequence[RadixNode]) -> None:
        """Bring demoted nodes back; the caller made sure that there is room.

        The slots are theirs at once, K and V arrive layer by layer (``Transfers.wait_for``).
        """
        lists: list[tuple[HeadSlots, Tensor]] = []
        for node in nodes:
            assert node.host is not None
            lists.append((node.host, self._pool.allocate(node.host.num_slots)))
        if not lists:
            return
        assert self.host is not None
        self._transfers.fetch(self.host, self._pool, lists)
        for node, (lost, slots) in zip(nodes, lists, strict=True):
            self.host.free(lost.slots)
            self.counts.promoted += lost.num_slots
            self._tree.replace(node, HeadSlots.merge(node.slots, lost.with_slots(slots)), None)

    def prune(self, node: RadixNode, keep: Tensor) -> None:
        """Drop for good the slots of a node where ``keep`` (bool ``[num_slots]``) is False."""
        core, rest = node.slots.partition(keep)
        self._free(rest.slots)
        self.counts.pruned += rest.num_slots
        self._tree.replace(node, core, node.host)

    def _shrink(self, node: RadixNode) -> None:
        keep = self._core(node)
        if keep is None:
            node.settled = True
            return
        core, rest = node.slots.partition(keep)
        if self._demote(node, rest, core):
            return
        if self._may_drop(node):
            self.prune(node, keep)
        else:
            node.settled = True

    def _core(self, node: RadixNode) -> Tensor | None:
        if not node.prunable or self.choose_core is None:
            # Full attention needs all of it again: it can only move as a whole.
            return torch.zeros(node.slots.num_slots, dtype=torch.bool, device=self._pool.kv.device)
        choose = self.choose_repeated if node.repeated else None
        importance = self._pool.importance[node.slots.slots].float()
        return (choose or self.choose_core)(node.slots, importance)

    def _may_drop(self, node: RadixNode) -> bool:
        return self._may_prune and node.prunable and self.choose_core is not None

    def _demote(self, node: RadixNode, rest: HeadSlots, core: HeadSlots | None) -> bool:
        """Move ``rest`` of a node to the host tier; False when it does not fit there."""
        if self.host is None or not self._make_host_room(rest.num_slots, node):
            return False
        slots = self.host.allocate(rest.num_slots)
        sent = self._transfers.send(self._pool, rest.slots, self.host, slots)
        self._pool.free(rest.slots, after=sent)
        self.counts.demoted += rest.num_slots
        moved = rest.with_slots(slots)
        if core is None:
            assert node.host is not None
            core = rest.partition(torch.zeros_like(rest.slots, dtype=torch.bool))[0]
            moved = HeadSlots.merge(node.host, moved)
        self._tree.replace(node, core, moved)
        return True

    def _make_host_room(self, num_slots: int, keep: RadixNode) -> bool:
        """Free host slots by forgetting the oldest demoted ones; never touches ``keep``."""
        assert self.host is not None
        if num_slots > self.host.capacity:
            return False
        passed: list[RadixNode] = []
        while self.host.num_free < num_slots and (node := self._tree.hosted.pop()):
            assert node.host is not None
            droppable = node.slots.num_slots > 0 and self._may_drop(node)
            if node is keep or not (node.is_leaf or droppable):
                passed.append(node)
            elif droppable:
                self.host.free(node.host.slots)
                self.counts.pruned += node.host.num_slots
                self._tree.replace(node, node.slots, None)
            else:
                self._evict(node, None)
        for node in passed:
            self._tree.hosted.offer(node)
        return self.host.num_free >= num_slots

    def _evict(self, node: RadixNode, wanted: int | None) -> None:
        """Remove a leaf, or only as much of its tail as gives ``wanted`` device slots."""
        if wanted is not None and node.slots.num_slots:
            per_token = max(1, node.slots.num_slots // len(node.tokens))
            tail = -(-wanted // per_token)
            if tail < len(node.tokens):
                self._tree.split_tail(node, tail)
        self._tree.remove(node)
        self._free(node.slots.slots)
        self.counts.evicted += node.slots.num_slots
        if node.host is not None:
            assert self.host is not None
            self.host.free(node.host.slots)
            self.counts.evicted += node.host.num_slots

    def _free(self, slots: Tensor) -> None:
        """Free device slots of a node, some of which may still be arriving."""
        self._pool.free(slots, after=self._transfers.pending)

    def _demote_ahead(self, num_slots: int) -> None:
        """Demote complete nodes until ``num_slots`` are free; drops nothing for it."""
        assert self.host is not None
        while self._pool.num_free < num_slots and (node := self._tree.full.pop()):
            if self.host.num_free < node.slots.num_slots:
                self._tree.full.offer(node)
                return
            self._shrink(node)
