"""Random operations on the cache; every token's value must stay readable where it was put."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.manager import CacheManager
from tca_runtime.cache.radix_tree import Namespace
from tca_runtime.cache.reclaim import CoreChooser
from tca_runtime.cache.sequence import Sequence
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.cache.transfer import Transfers
from tca_runtime.cache.views import ViewTable
from tests.cache.late_transfers import LateTransfers

LAYERS, HEADS, CAPACITY = 2, 2, 60
ROWS = LAYERS * HEADS
NAMESPACES = [Namespace(), Namespace("other", prunable=False)]
CPU = torch.device("cpu")


def keep_half(slots: HeadSlots, importance: torch.Tensor) -> torch.Tensor | None:
    """A core that differs between rows: even positions in even rows, odd ones in odd rows."""
    rows = torch.from_numpy(np.repeat(np.arange(len(slots.lengths)), slots.lengths))
    return (slots.positions + rows) % 2 == 0


def make_manager(
    tokens: int = CAPACITY,
    requests: int = 4,
    host_tokens: int = 0,
    choose_core: CoreChooser | None = None,
    may_prune: bool = True,
    transfers: Transfers | None = None,
) -> CacheManager:
    pool = SlotPool(tokens * ROWS + 1, 2, torch.float32, CPU)
    host = SlotPool(host_tokens * ROWS + 1, 2, torch.float32, CPU) if host_tokens else None
    views = ViewTable(requests, LAYERS, HEADS, (8 * tokens + 1600) * ROWS, CPU)
    return CacheManager(
        pool,
        views,
        host=host,
        choose_core=choose_core,
        may_prune=may_prune,
        transfers=transfers,
    )


def prefix_value(tokens: np.ndarray, row: int) -> float:
    """What K of the last of ``tokens`` must read: a function of the whole prefix and the row."""
    return float(hash((tuple(tokens.tolist()), row)) % 9973)


@dataclass(eq=False)
class Running:
    """A request; ``selected`` is what each row's view listed when it was last selected."""

    namespace: Namespace
    tokens: np.ndarray
    sequence: Sequence
    selected_at: int = 0
    selected: list[list[float]] = field(default_factory=list)


def write(manager: CacheManager, run: Running, begin: int, slots: torch.Tensor) -> None:
    for column in range(slots.shape[1]):
        for row in range(ROWS):
            value = prefix_value(run.tokens[: begin + column + 1], row)
            manager.pool.kv[slots[row, column]] = value


def assert_readable(manager: CacheManager, run: Running, complete: bool) -> None:
    """Each row reads what was written, in order: all of it, or what pruning left of it."""
    lists = manager.views.lists(torch.tensor([run.sequence.view.index]))
    for row in range(ROWS):
        layer, head = divmod(row, HEADS)
        manager.transfers.wait_for(layer)
        begin = int(lists.start[0, layer, head])
        slots = lists.arena[begin : begin + int(lists.length[0, layer, head])]
        expected = [prefix_value(run.tokens[: i + 1], row) for i in range(run.sequence.computed)]
        found = manager.pool.kv[slots.long(), 0, 0].tolist()
        if run.selected:
            assert found == run.selected[row] + expected[run.selected_at :]
        elif complete or not run.namespace.prunable:
            assert found == expected
        else:
            rest = iter(expected)
            assert all(value in rest for value in found), "not a subsequence"
            own = run.sequence.computed - run.sequence.handle.num_tokens
            assert own == 0 or found[-own:] == expected[-own:]


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=14)


class CacheMachine(RuleBasedStateMachine):
    """Random requests over a three-token alphabet, so prefixes are shared all the time."""

    host_tokens = 0
    choose_core: CoreChooser | None = None
    may_prune = True
    late = False

    def __init__(self) -> None:
        super().__init__()
        self.transfers = LateTransfers(LAYERS) if self.late else None
        self.manager = make_manager(
            host_tokens=self.host_tokens,
            choose_core=type(self).choose_core,
            may_prune=self.may_prune,
            transfers=self.transfers,
        )
        self.running: list[Running] = []

    def pick(self, data: st.DataObject) -> Running:
        return self.running[data.draw(st.integers(0, len(self.running) - 1))]

    @rule(
        prompt=prompts,
        namespace=st.sampled_from(NAMESPACES),
        chunk=st.integers(1, 9),
    )
    def admit(self, prompt: list[int], namespace: Namespace, chunk: int) -> None:
        tokens = np.array(prompt, dtype=np.int32)
        match = self.manager.match(namespace, tokens[:-1])
        missing = len(tokens) - match.num_tokens
        sequence = self.manager.begin(match, headroom=missing + 3)
        if sequence is None:
            assert len(self.running) == 4 or self.host_tokens
            return
        run = Running(namespace, tokens, sequence)
        self.running.append(run)
        while sequence.computed < len(tokens):
            size = min(chunk, len(tokens) - sequence.computed)
            if size > self.manager.available_tokens:
                return
            begin = sequence.computed
            write(self.manager, run, begin, self.manager.extend(sequence, size))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(0, 2))
    def decode(self, data: st.DataObject, token: int) -> None:
        run = self.pick(data)
        full = run.sequence.computed == len(run.tokens)
        if not full or not self.manager.reserve([run.sequence]):
            return
        index = torch.tensor([run.sequence.view.index])
        run.tokens = np.append(run.tokens, np.int32(token))
        begin = run.sequence.computed
        self.manager.step([run.sequence], index)
        slots = self.manager.views.last_slots(self.manager.views.lists(index))
        write(self.manager, run, begin, slots.view(ROWS, 1))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        run = self.pick(data)
        if run.sequence.allocated == run.sequence.computed:
            self.manager.commit(run.namespace, run.sequence, run.tokens[: run.sequence.computed])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), seed=st.integers(0, 1 << 16), drop=st.booleans())
    def select(self, data: st.DataObject, seed: int, drop: bool) -> None:
        """Show a part, other tokens in every row; with immediate retention drop the others."""
        run = self.pick(data)
        sequence = run.sequence
        if not run.namespace.prunable or sequence.allocated != sequence.computed:
            return
        if not sequence.computed:
            return
        lists = HeadSlots.concat(self.manager.parts(sequence))
        assert lists.is_full or self.prunes
        chance = torch.rand(lists.num_slots, generator=torch.Generator().manual_seed(seed))
        keep = (chance < 0.6) | (lists.positions == lists.end - 1)
        kept = lists.partition(keep)[0]
        if self.manager.show([sequence], [kept.lengths], [kept.slots]) == [False]:
            return
        run.selected_at = sequence.computed
        run.selected = [
            [prefix_value(run.tokens[: p + 1], row) for p in positions.tolist()]
            for row, (positions, _) in enumerate(kept.split_rows())
        ]
        if drop and self.prunes:
            self.manager.prune(sequence, lists.end, kept.slots)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        run = self.pick(data)
        self.running.remove(run)
        kept = run.sequence.computed if keep else 0
        self.manager.release(run.namespace, run.sequence, run.tokens[:kept])

    @rule()
    def flush(self) -> None:
        self.manager.flush()
        if not self.running:
            assert self.manager.usage().tree_slots == 0

    @precondition(lambda self: self.late)
    @rule(count=st.integers(1, 4))
    def copies_proceed(self, count: int) -> None:
        assert self.transfers is not None
        self.transfers.proceed(count)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        assert_readable(self.manager, self.pick(data), complete=not self.prunes)

    @invariant()
    def consistent(self) -> None:
        self.manager.check()
        # Reading waits for copies, and late ones are to stay late.
        for run in [] if self.late else self.running:
            assert_readable(self.manager, run, complete=not self.prunes)

    @property
    def prunes(self) -> bool:
        return type(self).choose_core is not None and self.may_prune


class PruningMachine(CacheMachine):
    """No host tier: under pressure prefixes lose all but their core."""

    choose_core = staticmethod(keep_half)


class DemotingMachine(CacheMachine):
    """A host tier, and nothing may be dropped: a prefix is complete or gone."""

    choose_core = staticmethod(keep_half)
    host_tokens = 40
    may_prune = False


class TieredMachine(CacheMachine):
    """A small host tier in front of pruning."""

    choose_core = staticmethod(keep_half)
    host_tokens = 25


class OffloadingMachine(CacheMachine):
    """Full attention with a host tier: prefixes move whole."""

    host_tokens = 40


class LateDemotingMachine(DemotingMachine):
    late = True


class LateTieredMachine(TieredMachine):
    late = True


class LateOffloadingMachine(OffloadingMachine):
    late = True


MACHINES = [
    CacheMachine,
    PruningMachine,
    DemotingMachine,
    TieredMachine,
    OffloadingMachine,
    LateDemotingMachine,
    LateTieredMachine,
    LateOffloadingMachine,
]
