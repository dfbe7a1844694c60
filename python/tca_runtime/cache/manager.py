"""Slot pool, radix tree and views behind one door: the cache as the scheduler knows it."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.radix_tree import Namespace, PrefixMatch, RadixTree, Tokens
from tca_runtime.cache.reclaim import CoreChooser, ReclaimCounts, Reclaimer
from tca_runtime.cache.sequence import Sequence
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.cache.transfer import Transfers, create_transfers
from tca_runtime.cache.views import ViewTable

logger = logging.getLogger(__name__)

# Slots for generated tokens are taken this many tokens at a time: one allocation and one write
# into the view per block instead of per step.
DECODE_BLOCK = 32
# Tokens by which a full view grows: each growth copies the lists once.
VIEW_GROWTH = 512
# One slot in so many is kept free where demotion runs beside the steps.
HEADROOM = 64


@dataclass(frozen=True)
class CacheUsage:
    """Where the slots are. ``full_equivalent`` is what a full cache of the same tokens needs."""

    total_slots: int
    free_slots: int
    tree_slots: int
    running_slots: int
    cached_tokens: int
    full_equivalent_slots: int
    host_total_slots: int
    host_free_slots: int
    host_tree_slots: int


class CacheManager:
    """Gives requests their slots and shares prefixes between them.

    Slots move in one circle: pool -> sequence (``extend``) -> tree (``commit``, ``release``)
    -> pool (``Reclaimer``). Slots of a sequence are freed in one place, ``release``.

    Parameters
    ----------
    share_prefixes : False disables the tree; every request then computes its whole prompt
    host : host tier, None for none
    choose_core, may_prune : how cold prefixes shrink, see ``Reclaimer``
    transfers : carries slots between the tiers; what suits the pool's device if absent

    Attributes
    ----------
    transfers : attention asks it for each layer before it reads there
    """

    def __init__(
        self,
        pool: SlotPool,
        views: ViewTable,
        share_prefixes: bool = True,
        *,
        host: SlotPool | None = None,
        choose_core: CoreChooser | None = None,
        may_prune: bool = True,
        transfers: Transfers | None = None,
    ) -> None:
        self.pool = pool
        self.views = views
        self.tree = RadixTree()
        self.transfers = transfers or create_transfers(views.num_layers, pool.kv.device)
        self.reclaimer = Reclaimer(
            self.tree,
            pool,
            host,
            choose_core,
            may_prune,
            transfers=self.transfers,
            headroom=pool.capacity // HEADROOM if pool.kv.is_cuda else 0,
        )
        self.share_prefixes = share_prefixes
        self._running: set[Sequence] = set()

    @property
    def rows(self) -> int:
        """Slots per token of a full cache."""
        return self.views.rows

    @property
    def available_tokens(self) -> int:
        """Tokens that fit after evicting all that is unlocked."""
        return (self.pool.num_free + self.tree.evictable_slots) // self.rows

    @property
    def capacity_tokens(self) -> int:
        return self.pool.capacity // self.rows

    def match(self, namespace: Namespace, tokens: Tokens) -> PrefixMatch:
        """Look up the longest cached prefix; changes nothing."""
        return self.tree.match(namespace, tokens if self.share_prefixes else tokens[:0])

    def begin(self, match: PrefixMatch, headroom: int, is_use: bool = True) -> Sequence | None:
        """Lock a prefix for a request and open its view with room for ``headroom`` tokens.

        What the prefix has in the host tier starts to come back, layer by layer. None when slots
        or the view table have no room; nothing is locked then. Unless it ``is_use``, the prefix
        stays as cold as it was.
        """
        handle = self.tree.lock(match, is_use)
        path = self.tree.path(handle)
        demoted = [node for node in path if node.host is not None]
        needed = sum(node.host.num_slots for node in demoted if node.host is not None)
        view = None
        if needed <= self.pool.num_free + self.tree.evictable_slots:
            self.reclaimer.make_room(needed)
            self.reclaimer.promote(demoted)
            view = self.views.open([node.slots for node in path], headroom)
        if view is None:
            self.tree.unlock(handle)
            return None
        sequence = Sequence(handle, view, computed=handle.num_tokens)
        self._running.add(sequence)
        return sequence

    def extend(self, sequence: Sequence, num_tokens: int) -> Tensor:
        """Take slots for the next prompt tokens and show them: int32 ``[rows, num_tokens]``."""
        slots = self._take(sequence, num_tokens)
        self.views.advance([sequence.view], sequence.view.index, num_tokens)
        sequence.computed += num_tokens
        return slots

    def reserve(self, sequences: Many[Sequence]) -> bool:
        """Make sure each sequence can grow by one token, evicting if need be.

        False when slots or view space do not suffice; then nothing is shown, and the caller ends
        or retracts a request before it tries again.
        """
        needy = [s for s in sequences if not s.view.prepared]
        if len(needy) > self.available_tokens:
            return False
        for i, sequence in enumerate(needy):
            view = sequence.view
            if not view.headroom and not self.views.grow(view, VIEW_GROWTH):
                return False
            fair = self.available_tokens // (len(needy) - i)
            self._take(sequence, max(1, min(DECODE_BLOCK, view.headroom, fair)))
        return True

    def step(self, sequences: Many[Sequence], indices: Tensor) -> None:
        """Show one more reserved slot per sequence; ``indices`` are the rows of their views."""
        self.views.advance([s.view for s in sequences], indices, 1)
        for sequence in sequences:
            sequence.computed += 1

    def note_step(self, sequences: Many[Sequence]) -> None:
        """The host's half of ``step``, for a captured graph that does the device's."""
        self.views.note_advance([s.view for s in sequences], 1)
        for sequence in sequences:
            sequence.computed += 1

    def commit(self, namespace: Namespace, sequence: Sequence, tokens: Tokens) -> None:
        """Put computed tokens into the tree while the request runs on.

        ``tokens`` are the request's first ids, at most ``sequence.computed``. The view is
        unchanged: where another request was first, this one keeps reading its own copies.
        """
        begin = sequence.handle.num_tokens
        if not self.share_prefixes or len(tokens) == begin:
            return
        owned = HeadSlots.full(begin, torch.cat(sequence.blocks, dim=1))
        value, rest = owned.split(len(tokens))
        sequence.duplicates += self.tree.insert(namespace, tokens, value)
        sequence.blocks = [rest.dense()] if rest.num_tokens else []
        old = sequence.handle
        sequence.handle = self.tree.lock(self.tree.match(namespace, tokens))
        self.tree.unlock(old)

    def release(self, namespace: Namespace, sequence: Sequence, tokens: Tokens) -> None:
        """End a sequence: its computed tokens go to the tree, all other slots to the pool.

        ``tokens``: the request's first ids, at most ``sequence.computed``; what is beyond them is
        not cached.
        """
        begin = sequence.handle.num_tokens
        if sequence.blocks:
            owned = HeadSlots.full(begin, torch.cat(sequence.blocks, dim=1))
            keep = len(tokens) if self.share_prefixes else 0
            kept, spare = owned.split(max(keep, begin))
            if kept.num_tokens:
                sequence.duplicates += self.tree.insert(namespace, tokens, kept)
            self.pool.free(spare.slots)
        for part in sequence.duplicates:
            self.pool.free(part.slots)
        self.tree.unlock(sequence.handle)
        self.views.close(sequence.view)
        self._running.remove(sequence)

    def parts(self, sequence: Sequence) -> list[HeadSlots]:
        """Everything that exists of a sequence's computed tokens, in order."""
        parts = []
        for node in self.tree.path(sequence.handle):
            part = node.slots
            if not part.is_full:
                # The tree lost some of it; this request may have computed it anew.
                part = sequence.copy_of(part.begin, part.end) or part
            parts.append(part)
        if sequence.blocks:
            owned = HeadSlots.full(sequence.handle.num_tokens, torch.cat(sequence.blocks, dim=1))
            parts.append(owned.split(sequence.computed)[0])
        return parts

    def show(
        self,
        sequences: Many[Sequence],
        lengths: Many[NDArray[np.int64]],
        slots: Many[Tensor],
    ) -> list[bool]:
        """Let each sequence attend to its ``slots`` only (row after row), and to what follows.

        False where there is no room for the new lists: it keeps seeing what it saw, none of which
        may then be dropped. Reserved slots are given back.
        """
        for sequence in sequences:
            self._unreserve(sequence)
        views = [sequence.view for sequence in sequences]
        shown = self.views.replace(views, lengths, slots, VIEW_GROWTH)
        if not all(shown):
            logger.warning("the view arena is full: %d keep their old view", shown.count(False))
        return shown

    def prune(self, sequence: Sequence, num_tokens: int, shown: Tensor) -> None:
        """Drop for good what a committed sequence's view does not show.

        ``shown``: the slots that the view has of its first ``num_tokens`` tokens. Nodes that others
        use too stay whole, and so do those of which the request reads its own copy.
        """
        kept = torch.zeros(self.pool.capacity + 1, dtype=torch.bool, device=shown.device)
        kept.index_fill_(0, shown.long(), True)
        for node in self.tree.path(sequence.handle):
            part = node.slots
            is_own = part.is_full or sequence.copy_of(part.begin, part.end) is None
            if node.locks == 1 and part.end <= num_tokens and is_own:
                self.reclaimer.prune(node, kept[part.slots])

    def flush(self) -> None:
        """Drop every unlocked prefix."""
        self.reclaimer.evict_all()

    def reset(self) -> None:
        """Drop every unlocked prefix and what was counted so far."""
        self.flush()
        self.reclaimer.counts = ReclaimCounts()

    def usage(self) -> CacheUsage:
        host = self.reclaimer.host
        return CacheUsage(
            total_slots=self.pool.capacity,
            free_slots=self.pool.num_free,
            tree_slots=self.tree.num_slots,
            running_slots=sum(s.owned_slots for s in self._running),
            cached_tokens=self.tree.num_tokens,
            full_equivalent_slots=self.tree.num_tokens * self.rows,
            host_total_slots=host.capacity if host else 0,
            host_free_slots=host.num_free if host else 0,
            host_tree_slots=self.tree.num_host_slots,
        )

    def check(self, every_slot: bool = True) -> None:
        """Raise AssertionError when a slot is lost, owned twice, or a counter is off.

        ``every_slot`` also looks at the owner of each slot, which takes time with the pool's size.
        """
        self.tree.check()
        usage = self.usage()
        found = usage.free_slots + usage.tree_slots + usage.running_slots
        assert found == usage.total_slots, f"slots lost or doubled: {usage}"
        found = usage.host_free_slots + usage.host_tree_slots
        assert found == usage.host_total_slots, f"host slots lost or doubled: {usage}"
        if not every_slot:
            return
        owned = [self.pool.free_slots(), *(node.slots.slots for node in self.tree.nodes())]
        for sequence in self._running:
            owned += [block.reshape(-1) for block in sequence.blocks]
            owned += [part.slots for part in sequence.duplicates]
        counts = torch.bincount(torch.cat(owned), minlength=self.pool.capacity + 1)
        assert bool((counts[1:] == 1).all()), "a slot has two owners or none"

    def _unreserve(self, sequence: Sequence) -> None:
        """Give back slots that were taken for tokens to come."""
        if sequence.allocated == sequence.computed:
            return
        owned = torch.cat(sequence.blocks, dim=1)
        used = sequence.computed - sequence.handle.num_tokens
        self.pool.free(owned[:, used:])
        sequence.blocks = [owned[:, :used]] if used else []
        sequence.view.prepared = 0

    def _take(self, sequence: Sequence, num_tokens: int) -> Tensor:
        count = num_tokens * self.rows
        self.reclaimer.make_room(count)
        slots = self.pool.allocate(count).view(self.rows, num_tokens)
        sequence.blocks.append(slots)
        self.views.prepare(sequence.view, slots)
        return slots
