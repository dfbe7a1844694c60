"""Jobs that hang fail for their caller and do not starve the others."""

import threading
import time
from contextlib import ExitStack

import pytest

from tca_runtime.engine.job_pool import JobPool, PoolOverloaded


class Late(Exception):
    pass


@pytest.fixture
def release() -> threading.Event:
    return threading.Event()


def hang(release: threading.Event) -> int:
    release.wait(30)
    return 0


def test_results_and_errors_reach_the_caller() -> None:
    pool: JobPool[int] = JobPool(workers=2, time_limit=30, max_late=1)
    futures = [pool.submit(lambda i=i: 10 // i, Late()) for i in (5, 2, 0)]
    assert [f.result(10) for f in futures[:2]] == [2, 5]
    with pytest.raises(ZeroDivisionError):
        futures[2].result(10)


def test_jobs_wait_for_a_free_worker(release: threading.Event) -> None:
    pool: JobPool[int] = JobPool(workers=1, time_limit=30, max_late=1)
    with ExitStack() as stack:
        stack.callback(release.set)
        first, second = pool.submit(lambda: hang(release), Late()), pool.submit(lambda: 7, Late())
        assert not second.done()
    assert (first.result(10), second.result(10)) == (0, 7)


def test_a_hanging_job_gives_its_place_away(release: threading.Event) -> None:
    pool: JobPool[int] = JobPool(workers=1, time_limit=0.05, max_late=2)
    with ExitStack() as stack:
        stack.callback(release.set)
        hanging = pool.submit(lambda: hang(release), Late("too slow"))
        waiting = pool.submit(lambda: 7, Late())
        with pytest.raises(Late, match="too slow"):
            hanging.result(10)
        assert waiting.result(10) == 7


def test_too_many_hanging_jobs_refuse_new_ones_until_one_ends(release: threading.Event) -> None:
    pool: JobPool[int] = JobPool(workers=2, time_limit=0.05, max_late=2)
    with ExitStack() as stack:
        stack.callback(release.set)
        for future in [pool.submit(lambda: hang(release), Late()) for _ in range(2)]:
            with pytest.raises(Late):
                future.result(10)
        with pytest.raises(PoolOverloaded):
            pool.submit(lambda: 1, Late()).result(10)
    assert result_when_possible(pool) == 1


def result_when_possible(pool: JobPool[int]) -> int:
    for _ in range(1000):
        try:
            return pool.submit(lambda: 1, Late()).result(10)
        except PoolOverloaded:
            time.sleep(0.01)
    raise AssertionError("the pool never recovered")


def test_hanging_jobs_that_wait_are_refused_instead_of_starting_without_end(
    release: threading.Event,
) -> None:
    workers, max_late = 2, 3
    pool: JobPool[int] = JobPool(workers, time_limit=0.05, max_late=max_late)
    started: list[int] = []

    def job(number: int) -> int:
        started.append(number)
        return hang(release)

    with ExitStack() as stack:
        stack.callback(release.set)
        futures = [pool.submit(lambda i=i: job(i), Late()) for i in range(10)]
        errors = [type(future.exception(10)) for future in futures]
        time.sleep(0.3)
        assert len(started) <= workers + max_late
    assert [error is Late for error in errors] == [i in started for i in range(10)]
    assert set(errors) == {Late, PoolOverloaded}
    assert result_when_possible(pool) == 1


def test_a_job_taken_back_is_not_begun(release: threading.Event) -> None:
    pool: JobPool[int] = JobPool(workers=1, time_limit=30, max_late=1)
    ran: list[int] = []

    def job(number: int) -> int:
        ran.append(number)
        return number

    with ExitStack() as stack:
        stack.callback(release.set)
        first = pool.submit(lambda: hang(release), Late())
        second, third = (pool.submit(lambda i=i: job(i), Late()) for i in (2, 3))
        assert pool.cancel(second) and second.cancelled()
        assert not pool.cancel(first)
    assert (first.result(10), third.result(10)) == (0, 3)
    assert ran == [3]
