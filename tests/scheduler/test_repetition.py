"""Cold prefixes that the model repeats while nobody asks for anything."""

from __future__ import annotations

import pytest
import torch

from tca_runtime.config import SparsityArgs
from tca_runtime.scheduler import scheduler as scheduler_module
from tca_runtime.scheduler.repetition import PIECE, Repetition, create_repetition
from tests.scheduler.tiny_server import Server, prompt

ASK = [1, 2, 3]


def repeating(server: Server, piece: int = 64) -> Repetition:
    return Repetition(server.engine, ASK, 32768, piece)


def importance_of(server: Server) -> torch.Tensor:
    (node,) = server.engine.cache.tree.nodes()
    return server.engine.cache.pool.importance[node.slots.slots].float()


def test_every_token_of_a_prefix_is_scored_and_nothing_else_changes() -> None:
    text = prompt(1, 500)
    server, other = Server(), Server()
    for each in (server, other):
        each.submit("a", text, 0)
        each.run()
    before = importance_of(server)
    cache = server.engine.cache
    usage, (node,) = cache.usage(), cache.tree.nodes()
    accessed = node.last_access, node.hits
    repetition = repeating(server)
    while repetition.advance():
        cache.check()
    assert repetition.num_passes == -(-500 // 64)
    assert cache.usage() == usage and node.repeated
    assert (node.last_access, node.hits) == accessed
    after = importance_of(server)
    assert bool((after >= before).all()) and bool((after > 0).all())
    # What a later request reads is what it would have read.
    assert server.ask([*text, 7, 8]) == other.ask([*text, 7, 8])


def test_only_what_was_added_is_repeated() -> None:
    server = Server()
    history = prompt(1, 300)
    server.ask(history, 0)
    repetition = repeating(server)
    while repetition.advance():
        pass
    first = repetition.num_passes
    history += prompt(2, 130)
    server.ask(history, 0)
    while repetition.advance():
        pass
    assert repetition.num_passes - first == -(-130 // 64)
    assert all(node.repeated for node in server.engine.cache.tree.nodes())


def test_heads_compete_for_what_stays_of_a_repeated_prefix_only() -> None:
    kept = {}
    for repeat in (False, True):
        server = Server()
        server.submit("a", prompt(1, 1000), 0)
        server.run()
        repetition = repeating(server)
        while repeat and repetition.advance():
            pass
        server.engine.cache.reclaimer.shrink_all()
        (node,) = server.engine.cache.tree.nodes()
        kept[repeat] = node.slots.lengths.reshape(-1)
    assert kept[True].sum() == kept[False].sum()
    assert len(set(kept[False].tolist())) == 1 < len(set(kept[True].tolist()))


def test_no_slot_is_taken_from_anything_for_it() -> None:
    server = Server(tokens=1000)
    server.submit("a", prompt(1, 950), 0)
    server.run()
    repetition = repeating(server)
    assert not repetition.advance()
    assert server.engine.cache.tree.num_tokens == 950
    # It is repeated once there is room.
    server.engine.cache.flush()
    server.submit("b", prompt(2, 400), 0)
    server.run()
    assert repetition.advance()


def test_a_prefix_that_goes_away_meanwhile_is_left_alone() -> None:
    server = Server()
    server.submit("a", prompt(1, 500), 0)
    server.run()
    repetition = repeating(server)
    assert repetition.advance()
    server.engine.cache.flush()
    assert not repetition.advance()
    server.submit("b", prompt(2, 500), 0)
    server.run()
    assert repetition.advance()
    server.engine.cache.reclaimer.shrink_all()
    assert not repetition.advance()
    server.engine.cache.check()


def test_short_and_dense_prefixes_are_not_repeated() -> None:
    server = Server()
    server.submit("short", prompt(1, 60), 0)
    server.submit("dense", prompt(2, 500), 0, tca=False)
    server.run()
    assert not repeating(server).advance()
    assert not Repetition(server.engine, ASK, 500, 64).advance()


def test_the_scheduler_repeats_when_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "REPEAT_AFTER_SECONDS", 0.0)
    server = Server()
    repetition = server.scheduler._repetition = repeating(server)
    server.submit("a", prompt(1, 500))
    while server.engine.cache.tree.num_tokens == 0 or not server.scheduler.planner.is_idle:
        assert repetition.num_passes == 0
        server.scheduler.run_once()
    for _ in range(20):
        server.scheduler.run_once()
    assert repetition.num_passes == -(-511 // 64)
    assert server.scheduler._patience() > 0
    # A request that comes in between is answered at once, and the rest is repeated after it.
    server.engine.cache.flush()
    server.submit("b", prompt(3, 500))
    server.run()
    server.scheduler.run_once()
    assert server.scheduler._patience() == 0
    assert len(server.ask(prompt(4, 100))) == 12


def test_who_has_prefixes_repeated() -> None:
    def made(**args: str) -> Repetition | None:
        engine = Server().engine
        return create_repetition(SparsityArgs(**args), engine, lambda text: [1] * len(text), 1000)  # type: ignore[arg-type]

    assert made() is None and made(tca_repetition="off") is None
    assert made(tca_repetition="on", tca_retention="immediate") is None
    found = made(tca_repetition="on")
    assert found is not None and found._piece == PIECE["cpu"]
    dense = Server(disable_tca=True).engine
    assert create_repetition(SparsityArgs(tca_repetition="on"), dense, lambda text: [1], 99) is None
