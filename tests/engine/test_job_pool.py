"""Jobs that hang fail for their caller and do not starve the others."""

import threading
import time
from concurrent.futures import Future
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
            pool.submit(lambda: 1, Late())
    assert submit_when_possible(pool).result(10) == 1


def submit_when_possible(pool: JobPool[int]) -> Future[int]:
    for _ in range(1000):
        try:
            return pool.submit(lambda: 1, Late())
        except PoolOverloaded:
            time.sleep(0.01)
    raise AssertionError("the pool never recovered")
