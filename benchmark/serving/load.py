"""When to send: closed loop (fixed concurrency) or open loop (Poisson arrivals)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import aiohttp

from benchmark.serving.client import Endpoint, Message, send
from benchmark.serving.metrics import RequestResult
from benchmark.serving.workloads import Session

OnResult = Callable[[RequestResult], None]


async def run_closed_loop(
    http: aiohttp.ClientSession,
    endpoint: Endpoint,
    sessions: Sequence[Session],
    concurrency: int,
    on_result: OnResult,
) -> None:
    """Keep ``concurrency`` conversations going until all are done."""
    pending = iter(sessions)

    async def client() -> None:
        for session in pending:
            await _converse(http, endpoint, session, on_result)

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def run_open_loop(
    http: aiohttp.ClientSession,
    endpoint: Endpoint,
    sessions: Sequence[Session],
    rate: float,
    seed: int,
    on_result: OnResult,
) -> None:
    """Start conversations at Poisson arrivals, ``rate`` per second, however slow the server."""
    clock = asyncio.get_running_loop()
    origin = clock.time()
    tasks = []
    for session, offset in zip(sessions, arrivals(len(sessions), rate, seed), strict=True):
        await asyncio.sleep(origin + offset - clock.time())
        tasks.append(asyncio.create_task(_converse(http, endpoint, session, on_result)))
    await asyncio.gather(*tasks)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Offsets in seconds of a Poisson process, the first at zero."""
    rng = random.Random(seed)
    offsets = [0.0]
    while len(offsets) < count:
        offsets.append(offsets[-1] + rng.expovariate(rate))
    return offsets[:count]


async def _converse(
    http: aiohttp.ClientSession, endpoint: Endpoint, session: Session, on_result: OnResult
) -> None:
    messages = [Message("system", session.system)] if session.system else []
    for turn in session.turns:
        messages.append(Message("user", turn.text))
        result = await send(http, endpoint, messages, turn.max_tokens)
        on_result(result)
        if result.error is not None:
            return
        messages.append(Message("assistant", result.text))
