"""What refused clients are told."""

from __future__ import annotations

from tca_runtime.server.backoff import LONGEST, SHORTEST, WINDOW, Backoff


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_clients_are_spread_over_the_time_it_takes_to_make_room() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    for _ in range(5):
        backoff.note_end()
    told = [backoff.refuse() for _ in range(10)]
    # One request ends every two seconds.
    assert told == [2 * (i + 1) for i in range(10)]
    clock.now += WINDOW + 1
    backoff.note_end()
    assert backoff.refuse() == WINDOW


def test_bounds() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    assert SHORTEST <= backoff.refuse() <= WINDOW
    for _ in range(1000):
        backoff.note_end()
    assert backoff.refuse() == SHORTEST
    clock.now += WINDOW + 1
    backoff.note_end()
    assert [backoff.refuse() for _ in range(100)][-1] == LONGEST
