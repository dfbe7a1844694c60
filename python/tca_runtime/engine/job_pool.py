"""Background threads for native calls that nothing can interrupt."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


class PoolOverloaded(Exception):
    """Too many jobs that ran over their time are still running."""


@dataclass(eq=False)
class _Job(Generic[T]):
    run: Callable[[], T]
    late_error: Exception
    future: Future[T] = field(default_factory=Future)
    is_late: bool = False
    is_done: bool = False


class JobPool(Generic[T]):
    """Runs jobs on a few daemon threads, each job under a time limit.

    A job over its limit fails for its caller at once and gives its place to the next one. Its
    thread cannot be stopped, so it runs on in the background, unheeded; once ``max_late`` threads
    do, new jobs are refused until one of them ends. Daemon threads do not hold up process exit.
    """

    def __init__(self, workers: int, time_limit: float, max_late: int) -> None:
        """``time_limit`` in seconds, counted from the start of a job."""
        self._workers = workers
        self._time_limit = time_limit
        self._max_late = max_late
        self._lock = threading.Lock()
        self._queue: deque[_Job[T]] = deque()
        self._running = 0
        self._late = 0

    def submit(self, run: Callable[[], T], late_error: Exception) -> Future[T]:
        """Queue a job; never blocks. Its future fails with ``late_error`` past the limit.

        Raises
        ------
        PoolOverloaded
            When ``max_late`` jobs run on past their limit.
        """
        job = _Job(run, late_error)
        with self._lock:
            if self._late >= self._max_late:
                raise PoolOverloaded
            self._queue.append(job)
            self._start_next()
        return job.future

    def _start_next(self) -> None:
        if self._queue and self._running < self._workers:
            self._running += 1
            threading.Thread(target=self._run, args=[self._queue.popleft()], daemon=True).start()

    def _run(self, job: _Job[T]) -> None:
        timer = threading.Timer(self._time_limit, self._give_up, [job])
        timer.daemon = True
        timer.start()
        try:
            result = job.run()
        except Exception as error:
            if self._finish(job):
                job.future.set_exception(error)
        else:
            if self._finish(job):
                job.future.set_result(result)
        timer.cancel()

    def _finish(self, job: _Job[T]) -> bool:
        """Free the job's place; False when it had been given up."""
        with self._lock:
            job.is_done = True
            if job.is_late:
                self._late -= 1
                return False
            self._running -= 1
            self._start_next()
            return True

    def _give_up(self, job: _Job[T]) -> None:
        with self._lock:
            if job.is_done:
                return
            job.is_late = True
            self._running -= 1
            self._late += 1
            self._start_next()
        job.future.set_exception(job.late_error)
