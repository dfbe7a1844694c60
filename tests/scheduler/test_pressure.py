"""Memory under sustained pressure: never over-committed, and given up in the right order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tca_runtime.messages import AbortRequest, FinishReason, TokenBatch
from tests.scheduler.fakes import ROWS, Harness
from tests.scheduler.tiny_server import Server, prompt

# GiB; 2 * head_dim * 4 bytes a slot, 4 slots a token: about 1000 tokens.
SMALL_HOST = 1000 * 4 * 256 / 2**30


class Journal:
    """Notes each way in which a server gives up memory, and whether a milder one was left."""

    def __init__(self, server: Server) -> None:
        self.steps: list[str] = []
        self._cache = server.engine.cache
        self._reclaimer: Any = server.engine.cache.reclaimer
        self._wrap("_demote")
        self._wrap("prune")
        self._wrap("_evict")
        planner: Any = server.scheduler.planner
        retract = planner._retract

        def retracting(request: Any) -> None:
            # Nothing unlocked is left that could make room.
            assert self._cache.available_tokens <= len(planner.running) + len(planner.prefilling)
            self.steps.append("retract")
            retract(request)

        planner._retract = retracting

    def _wrap(self, name: str) -> None:
        original = getattr(self._reclaimer, name)
        counts = self._reclaimer.counts

        def wrapped(*args: Any) -> Any:
            if name == "_evict" and args[1] is not None:
                # Room is wanted on the device; otherwise a node of the host tier makes way there.
                full = self._cache.tree.full.pop()
                shrinks = full is not None and self._reclaimer._core(full) is not None
                assert not shrinks, "evicted while a complete prefix could still shrink"
            before = counts.pruned, counts.demoted, counts.evicted
            done = original(*args)
            after = counts.pruned, counts.demoted, counts.evicted
            for step, old, new in zip(("prune", "demote", "evict"), before, after, strict=True):
                if new > old:
                    self.steps.append(step)
            return done

        setattr(self._reclaimer, name, wrapped)

    def first(self, step: str) -> int:
        return self.steps.index(step)


def small_server(**settings: Any) -> Server:
    return Server(tokens=2500, host_gib=SMALL_HOST, **settings)


def overload(server: Server) -> Journal:
    """More and more prompts, of which ever less can be kept; then outputs that outgrow it all."""
    journal = Journal(server)
    for i in range(8):
        server.ask(prompt(i, 700), 4)
    for i in range(4):
        server.submit(f"long{i}", prompt(50 + i, 500), 600)
    server.run()
    return journal


def test_memory_is_given_up_in_order_and_counted() -> None:
    server = small_server()
    before = server.scheduler.state()
    assert set(before["reclaimed_slots"].values()) == {0} and before["num_retractions"] == 0
    journal = overload(server)
    order = [journal.first(step) for step in ("demote", "prune", "evict", "retract")]
    assert order == sorted(order)
    for i in range(4):
        assert len(server.tokens(f"long{i}")) == 600
    state = server.scheduler.state()
    for counter in ("demoted", "pruned", "evicted"):
        assert state["reclaimed_slots"][counter] > 0
    assert state["num_retractions"] == journal.steps.count("retract")
    replies = [m for m in server.mail.outbound if isinstance(m, TokenBatch)]
    retractions = [o.num_retractions for b in replies for o in b.outputs if o.finish is not None]
    assert sum(retractions) == state["num_retractions"]


def test_without_a_host_tier_pruning_comes_first() -> None:
    journal = overload(Server(tokens=2500))
    assert "demote" not in journal.steps
    assert journal.first("prune") < journal.first("evict") < journal.first("retract")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("retention", ["on-pressure", "immediate", "never"])
def test_the_pool_is_never_over_committed(seed: int, retention: str) -> None:
    """Random prompts, lengths and aborts; every slot has one owner after every step."""
    rng = np.random.default_rng(seed)
    server = small_server(tca_retention=retention, tca_refresh=64)
    shared = [prompt(100 + i, 400) for i in range(3)]
    waiting = 14
    expected: dict[str, int] = {}
    for step in range(3000):
        if waiting and rng.random() < 0.15:
            waiting -= 1
            rid = f"r{waiting}"
            own = prompt(int(rng.integers(1 << 30)), int(rng.integers(1, 900)))
            text = shared[rng.integers(3)] + own if rng.random() < 0.5 else own
            expected[rid] = int(rng.integers(1, 300))
            server.submit(rid, text, expected[rid])
        if rng.random() < 0.01 and expected:
            server.mail.inbound.append(AbortRequest(rid=str(rng.choice(list(expected)))))
        server.scheduler.run_once()
        usage = server.engine.cache.usage()
        assert usage.free_slots >= 0 and usage.running_slots + usage.tree_slots <= usage.total_slots
        server.engine.cache.check(every_slot=step % 10 == 0)
        if not waiting and server.scheduler.planner.is_idle:
            break
    server.run()
    for rid, tokens in expected.items():
        ends = [o.finish for o in server.outputs(rid) if o.finish is not None]
        assert len(ends) == 1
        assert isinstance(ends[0], FinishReason)
        assert ends[0].type == "abort" or len(server.tokens(rid)) == tokens
    server.engine.cache.flush()
    usage = server.engine.cache.usage()
    assert usage.free_slots == usage.total_slots
    assert usage.host_free_slots == usage.host_total_slots


def test_what_can_never_fit_is_refused_at_once_with_both_figures() -> None:
    harness = Harness(capacity_tokens=50, context=1000)
    harness.submit("running", [1] * 10, 30)
    harness.scheduler.run_once()
    harness.submit("never", [2] * 60, 5)
    harness.scheduler.run_once()
    finish = harness.finish("never")
    assert (finish.type, finish.status) == ("abort", 400)
    assert "60 tokens" in finish.message and "KV cache 50" in finish.message
    # The one beside it was not disturbed, and what just fits does run.
    harness.run()
    assert harness.finish("running").type != "abort"
    harness.submit("just", [2] * 49, 5)
    harness.run()
    assert harness.finish("just").type != "abort"
    assert harness.engine.cache.usage().total_slots == 50 * ROWS
