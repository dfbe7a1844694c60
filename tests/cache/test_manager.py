"""The cache against a naive model: every token's value must stay readable where it was put."""

from __future__ import annotations

import random
import weakref

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.lru import VOID_ENTRIES
from tca_runtime.cache.manager import CacheManager
from tca_runtime.cache.radix_tree import Namespace, RadixNode
from tca_runtime.cache.slot_pool import OutOfSlotsError, SlotPool
from tca_runtime.cache.views import ViewTable
from tests.cache.late_transfers import LateTransfers
from tests.cache.machines import (
    CPU,
    HEADS,
    LAYERS,
    MACHINES,
    NAMESPACES,
    ROWS,
    CacheMachine,
    Running,
    assert_readable,
    keep_half,
    make_manager,
    write,
)


@pytest.mark.parametrize("machine", MACHINES)
def test_random_operations(machine: type[CacheMachine]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None)
    )


@pytest.mark.parametrize("machine", MACHINES[1:])
def test_pressure_is_really_reached(machine: type[CacheMachine]) -> None:
    """The machines must demote, prune or promote, or they would prove nothing."""
    manager = make_manager(20, 4, machine.host_tokens, machine.choose_core, machine.may_prune)
    for start in (0, 20, 0, 20):
        run_prompt(manager, list(range(start, start + 14)))
    counts = manager.reclaimer.counts
    if machine.host_tokens:
        assert counts.demoted and counts.promoted
    else:
        assert counts.pruned


@pytest.mark.parametrize("machine", [m for m in MACHINES if m.late])
def test_late_copies_never_meet_a_new_owner(machine: type[CacheMachine]) -> None:
    """Four prompts take turns in a pool for one and a half: all of them leave and come back."""
    transfers = LateTransfers(LAYERS)
    manager = make_manager(
        22, 4, machine.host_tokens, machine.choose_core, machine.may_prune, transfers
    )
    dice = random.Random(0)
    for _ in range(200):
        tokens = np.arange(14, dtype=np.int32) + 100 * dice.randrange(4)
        sequence = manager.begin(manager.match(NAMESPACES[0], tokens[:-1]), len(tokens))
        assert sequence is not None
        run = Running(NAMESPACES[0], tokens, sequence)
        begin = sequence.computed
        write(manager, run, begin, manager.extend(sequence, len(tokens) - begin))
        transfers.proceed(dice.randrange(3))
        if dice.random() < 0.7:
            assert_readable(manager, run, complete=not machine.may_prune)
        manager.commit(run.namespace, sequence, tokens)
        manager.release(run.namespace, sequence, tokens)
        if dice.random() < 0.1:
            manager.flush()
        manager.check()
    counts = manager.reclaimer.counts
    assert counts.demoted and counts.promoted and counts.evicted


def run_prompt(
    manager: CacheManager, prompt: list[int], namespace: Namespace = NAMESPACES[0]
) -> int:
    """Prefill, commit and release a prompt; returns how many tokens were cached."""
    tokens = np.array(prompt, dtype=np.int32)
    sequence = manager.begin(manager.match(namespace, tokens), len(tokens))
    assert sequence is not None
    cached = sequence.computed
    if cached < len(tokens):
        manager.extend(sequence, len(tokens) - cached)
    manager.commit(namespace, sequence, tokens)
    manager.release(namespace, sequence, tokens)
    manager.check()
    return cached


def test_a_view_that_cannot_be_replaced_is_kept() -> None:
    manager = make_manager(tokens=30)
    tokens = np.arange(10, dtype=np.int32)
    sequence = manager.begin(manager.match(NAMESPACES[0], tokens), 10)
    assert sequence is not None
    manager.extend(sequence, 10)
    before = manager.views.lists(torch.tensor([sequence.view.index]))
    # Another view takes all but the arena's last entries.
    assert manager.views.open([], manager.views.num_free // ROWS) is not None
    lists = HeadSlots.concat(manager.parts(sequence))
    assert manager.show([sequence], [lists.lengths], [lists.slots]) == [False]
    after = manager.views.lists(torch.tensor([sequence.view.index]))
    assert torch.equal(after.start, before.start) and torch.equal(after.length, before.length)


def test_prefix_is_shared_within_a_namespace_only() -> None:
    manager = make_manager()
    assert run_prompt(manager, [1, 2, 3, 4]) == 0
    assert run_prompt(manager, [1, 2, 9]) == 2
    assert run_prompt(manager, [1, 2, 3, 4], namespace=Namespace("tenant")) == 0
    assert run_prompt(manager, [1, 2, 3, 4]) == 4


def test_eviction_takes_oldest_tail_first() -> None:
    manager = make_manager(tokens=20)
    run_prompt(manager, [1, 1, 1, 1, 1, 1])
    run_prompt(manager, [2, 2, 2, 2, 2, 2])
    run_prompt(manager, [1, 1, 1, 1, 1, 1])
    run_prompt(manager, [3] * 12)
    twos = manager.match(Namespace(), np.array([2] * 6, np.int32)).num_tokens
    ones = manager.match(Namespace(), np.array([1] * 6, np.int32)).num_tokens
    assert (twos, ones) == (2, 6)
    assert manager.reclaimer.counts.evicted == 4 * ROWS


def test_locked_prefix_is_never_evicted() -> None:
    manager = make_manager(tokens=10)
    tokens = np.arange(6, dtype=np.int32)
    sequence = manager.begin(manager.match(Namespace(), tokens), 6)
    assert sequence is not None
    manager.extend(sequence, 6)
    manager.commit(Namespace(), sequence, tokens)
    assert manager.available_tokens == 4
    with pytest.raises(OutOfSlotsError):
        manager.extend(sequence, 5)
    manager.flush()
    assert manager.match(Namespace(), tokens).num_tokens == 6


def test_concurrent_same_prompt_keeps_one_copy_in_the_tree() -> None:
    manager = make_manager()
    tokens = np.arange(5, dtype=np.int32)
    both = [manager.begin(manager.match(Namespace(), tokens), 5) for _ in range(2)]
    for sequence in both:
        assert sequence is not None
        manager.extend(sequence, 5)
    for sequence in both:
        assert sequence is not None
        manager.commit(Namespace(), sequence, tokens)
    usage = manager.usage()
    assert (usage.tree_slots, usage.running_slots) == (5 * ROWS, 5 * ROWS)
    for sequence in both:
        assert sequence is not None
        manager.release(Namespace(), sequence, tokens)
    manager.check()
    assert manager.usage().running_slots == 0


def test_what_was_evicted_is_forgotten() -> None:
    """Without pruning and host tier only one queue is ever popped; the others hold nothing back."""
    manager = make_manager(20, 4, 0, None, False)
    gone: list[weakref.ref[RadixNode]] = []
    for start in range(0, 4000, 20):
        gone += [weakref.ref(node) for node in manager.tree.nodes()]
        run_prompt(manager, list(range(start, start + 14)))
    alive = sum(node() is not None for node in gone)
    assert len(gone) > 190 and alive < 2 * VOID_ENTRIES


def test_without_sharing_nothing_is_kept() -> None:
    pool = SlotPool(20 * ROWS + 1, 2, torch.float32, CPU)
    views = ViewTable(2, LAYERS, HEADS, 100 * ROWS, CPU)
    manager = CacheManager(pool, views, share_prefixes=False)
    assert run_prompt(manager, [1, 2, 3]) == 0
    assert run_prompt(manager, [1, 2, 3]) == 0
    assert manager.usage().free_slots == 20 * ROWS


@pytest.mark.parametrize("host_tokens", [0, 40])
def test_tokens_computed_anew_are_seen_though_the_tree_has_lost_them(host_tokens: int) -> None:
    """The end of a prompt is always computed, also where a prefix of it is cached but shrunk."""
    manager = make_manager(host_tokens=host_tokens, choose_core=keep_half)
    run_prompt(manager, [1, 2, 3, 4, 5, 6])
    manager.reclaimer.shrink_all()
    tokens = np.array([1, 2, 3, 4, 5, 6, 7], dtype=np.int32)
    sequence = manager.begin(manager.match(Namespace(), tokens[:2]), 9)
    assert sequence is not None
    own = manager.extend(sequence, 5)
    manager.commit(Namespace(), sequence, tokens)
    lists = HeadSlots.concat(manager.parts(sequence))
    for row, (positions, slots) in enumerate(lists.split_rows()):
        assert positions.tolist()[-5:] == [2, 3, 4, 5, 6]
        assert slots.tolist()[-5:] == own[row].tolist()
    manager.prune(sequence, lists.end, lists.slots[torch.rand(lists.num_slots) < 0.5])
    manager.release(Namespace(), sequence, tokens)
    manager.check()
