"""Background threads for native calls that nothing can interrupt."""

from __future__ import annotations

import threading
from collections import OrderedDict
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
    do, what waits is refused, and so is what comes until one of them ends. There are never more
    than ``workers + max_late`` threads. Daemon threads do not hold up process exit.
    """

    def __init__(
        self,
        workers: int,
        time_limit: float,
        max_late: int,
        refusal: Callable[[], Exception] = PoolOverloaded,
    ) -> None:
        """
        Parameters
        ----------
        time_limit : seconds, counted from the start of a job
        refusal : makes the error of a job that is refused
        """
        self._refusal = refusal
        self._workers = workers
        self._time_limit = time_limit
        self._max_late = max_late
        self._lock = threading.Lock()
        self._queue: OrderedDict[Future[T], _Job[T]] = OrderedDict()
        self._running = 0
        self._late = 0

    def submit(self, run: Callable[[], T], late_error: Exception) -> Future[T]:
        """Queue a job; never blocks.

        Its future fails with ``late_error`` past the limit, and with a refusal when ``max_late``
        jobs run on past theirs.
        """
        job = _Job(run, late_error)
        with self._lock:
            self._queue[job.future] = job
            self._start_next()
            refused = self._take_refused()
        self._refuse(refused)
        return job.future

    def cancel(self, future: Future[T]) -> bool:
        """Take a job back that has not begun; False when it has."""
        with self._lock:
            job = self._queue.pop(future, None)
        return job is not None and future.cancel()

    def _start_next(self) -> None:
        if self._queue and self._running < self._workers and self._late < self._max_late:
            self._running += 1
            _, job = self._queue.popitem(last=False)
            threading.Thread(target=self._run, args=[job], daemon=True).start()

    def _take_refused(self) -> list[Future[T]]:
        # The late jobs may never end, so nobody can be left to wait for them.
        if self._late < self._max_late:
            return []
        refused = list(self._queue)
        self._queue.clear()
        return refused

    def _refuse(self, futures: list[Future[T]]) -> None:
        for future in futures:
            future.set_exception(self._refusal())

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
            refused = self._take_refused()
        job.future.set_exception(job.late_error)
        self._refuse(refused)
