"""The scheduler process as the launcher sees it: start, watch, end, start anew."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import zmq

from tca_runtime.channels import AsyncReceiver, Sender, UnreadableMessage
from tca_runtime.config import RuntimeConfig
from tca_runtime.messages import SchedulerFailed, SchedulerReady, ToScheduler, ToTokenizer
from tca_runtime.scheduler.process import STACKS_SIGNAL, Addresses, run_scheduler
from tca_runtime.tokenizer.manager import TokenizerManager

logger = logging.getLogger(__name__)

RESTART_WINDOW_SECONDS = 600.0
POLL_SECONDS = 0.1
# Printing the stacks of a hung process takes a moment, if it can at all.
STACKS_SECONDS = 1.0


class StartupError(RuntimeError):
    """The server could not start; the message says why."""


@dataclass(frozen=True)
class Life:
    """One scheduler process and its channels, from its start to its end.

    Each has channels of its own, so that nothing meant for the one before reaches it.
    """

    process: BaseProcess
    inbox: AsyncReceiver[ToTokenizer]
    outbox: Sender[ToScheduler]
    info: dict[str, Any]

    def close(self) -> None:
        self.inbox.close()
        self.outbox.close(linger_ms=0)


class RestartBudget:
    """Allows ``limit`` restarts within any ``window`` seconds."""

    def __init__(self, limit: int, window: float = RESTART_WINDOW_SECONDS) -> None:
        self._limit = limit
        self._window = window
        self._spent: deque[float] = deque()

    def spend(self, now: float) -> bool:
        """Take one restart; False when there is none left."""
        while self._spent and now - self._spent[0] > self._window:
            self._spent.popleft()
        if len(self._spent) >= self._limit:
            return False
        self._spent.append(now)
        return True


class Supervisor:
    """Keeps one scheduler process alive, or says why there is none.

    Parameters
    ----------
    directory : where the sockets live; private to this user

    Attributes
    ----------
    num_restarts : schedulers started after the first
    """

    def __init__(self, config: RuntimeConfig, directory: Path) -> None:
        self._config = config
        self._directory = directory
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._budget = RestartBudget(config.faults.max_restarts)
        self._process: BaseProcess | None = None
        self._num_lives = 0
        self.num_restarts = 0

    async def start(self) -> Life:
        """Start a scheduler and wait until it serves.

        Raises
        ------
        StartupError
            If it does not get there.
        """
        stem = f"ipc://{self._directory}/{self._num_lives}"
        addresses = Addresses(f"{stem}-scheduler", f"{stem}-tokenizer")
        self._num_lives += 1
        inbox: AsyncReceiver[ToTokenizer] = AsyncReceiver(
            self._context, addresses.tokenizer, ToTokenizer
        )
        process = multiprocessing.get_context("spawn").Process(
            target=run_scheduler, args=(self._config, addresses), name="scheduler", daemon=True
        )
        process.start()
        self._process = process
        try:
            info = await _ready(inbox, process)
        except BaseException:
            inbox.close()
            self.end()
            raise
        outbox: Sender[ToScheduler] = Sender(self._context, addresses.scheduler)
        return Life(process, inbox, outbox, {**info, "num_restarts": self.num_restarts})

    async def run(self, life: Life, manager: TokenizerManager) -> None:
        """Serve ``manager`` with schedulers until none may be started any more.

        A scheduler that ends or hangs fails what is open. ``manager.failure`` then says why, and
        stays when this returns.
        """
        while True:
            manager.fail(await self._loss(life, manager))
            logger.error("scheduler died: %s", manager.failure)
            # Freeing a device's memory takes a dying process a while.
            await asyncio.to_thread(self.end)
            restarted = await self._restart(manager)
            if restarted is None:
                life.close()
                return
            await manager.revive(restarted.outbox, restarted.inbox, restarted.info)
            life.close()
            life = restarted
            logger.warning("the scheduler is back, restart %d", self.num_restarts)

    def end(self) -> None:
        """Kill the scheduler, if there is one: it holds nothing that outlives it."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    async def _restart(self, manager: TokenizerManager) -> Life | None:
        while self._config.faults.restart_on_crash and not manager.draining:
            if not self._budget.spend(time.monotonic()):
                logger.error("too many restarts of the scheduler, giving up")
                return None
            self.num_restarts += 1
            try:
                return await self.start()
            except StartupError as error:
                logger.error("the scheduler cannot be restarted: %s", error)
        return None

    async def _loss(self, life: Life, manager: TokenizerManager) -> str:
        """Wait until the scheduler is of no more use; why that is."""
        limit = self._config.faults.watchdog_timeout
        checked = time.monotonic()
        while manager.failure is None:
            if not life.process.is_alive():
                return f"the scheduler exited with status {life.process.exitcode}"
            await asyncio.sleep(POLL_SECONDS)
            now = time.monotonic()
            # Silence counts only while this process was able to listen.
            listening = now - checked < 10 * POLL_SECONDS
            checked = now
            if limit and listening and manager.silence > limit:
                await _print_stacks(life.process)
                if manager.silence > limit:
                    return f"the scheduler hung: no step ended within {limit:g} s"
        return manager.failure


async def _ready(inbox: AsyncReceiver[ToTokenizer], process: BaseProcess) -> dict[str, Any]:
    while True:
        try:
            received = await asyncio.wait_for(inbox.receive(), timeout=0.5)
        except TimeoutError:
            if process.is_alive():
                continue
            raise StartupError(f"the scheduler exited with status {process.exitcode}") from None
        except UnreadableMessage as error:
            logger.error("%s", error)
            continue
        if isinstance(received, SchedulerReady):
            return received.info
        if isinstance(received, SchedulerFailed):
            raise StartupError(received.reason or received.traceback.strip().splitlines()[-1])


async def _print_stacks(process: BaseProcess) -> None:
    logger.error("the scheduler hangs; the stacks of its threads follow")
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, STACKS_SIGNAL)
        await asyncio.sleep(STACKS_SECONDS)
