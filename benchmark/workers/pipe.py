"""One JSON line in, one JSON line out, between a benchmark and its worker process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

Json = dict[str, Any]


class WorkerError(RuntimeError):
    """The worker died or took too long; the message ends with what it wrote to stderr."""


class Worker:
    """A running worker process. It is idle, blocked in a read, between questions."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str], timeout_s: float) -> None:
        self._process = process
        self._log = log
        self._timeout_s = timeout_s

    def ask(self, **question: Any) -> Json:
        """Send one question and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"worker ended:\n{self._tail()}") from None
        ready, _, _ = select.select([self._process.stdout], [], [], self._timeout_s)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise WorkerError(f"no answer within {self._timeout_s:.0f} s:\n{self._tail()}")
        answer: Json = json.loads(line)
        return answer

    def _tail(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-30:])


@contextmanager
def running_worker(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> Iterator[Worker]:
    """Run ``python -m module`` while the block lasts; ``timeout_s`` bounds each answer.

    ``environment`` replaces this process's.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        try:
            yield Worker(process, log, timeout_s)
        finally:
            process.kill()
            process.communicate()


def answer_questions(handle: Callable[[Json], Json]) -> None:
    """The worker's side: answer until stdin closes."""
    # Libraries print to stdout; only answers may go down the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(handle(json.loads(line))) + "\n")
        answers.flush()
