"""Whether tokens are generated, found out without taking anything from anybody."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from fastapi import Request

from tca_runtime.sampling_params import SamplingParams
from tca_runtime.server.errors import raise_if_failed
from tca_runtime.server.requests import new_rid
from tca_runtime.server.sse import until_disconnect
from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.manager import TokenizerManager
from tca_runtime.tokenizer.state import TextRequest

LIMIT_SECONDS = 20.0
# Below every client's: in a full queue a probe takes nobody's place.
PROBE_PRIORITY = -(2**63)
_POLL_SECONDS = 0.05


async def check_generation(http: Request, manager: TokenizerManager) -> None:
    """Return once a probe has got a token or, while it must wait, other requests have got on.

    Raises
    ------
    RequestError
        503 if neither happens in time.
    ClientGone
        If the client disconnects.
    """
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            await until_disconnect(http.receive, _generation(manager))
    except TimeoutError:
        raise RequestError("no token came in time", status=503) from None


async def _generation(manager: TokenizerManager) -> None:
    probe = asyncio.create_task(_probe(manager))
    progress = asyncio.create_task(_progress(manager))
    try:
        await asyncio.wait((probe, progress), return_when=asyncio.FIRST_COMPLETED)
        if not probe.done() or _is_refusal(probe.exception()):
            await progress
        else:
            probe.result()
    finally:
        probe.cancel()
        progress.cancel()
        await asyncio.gather(probe, progress, return_exceptions=True)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether a probe found no place; that alone does not mean that nothing is generated."""
    return isinstance(error, RequestError) and error.status == 503


async def _probe(manager: TokenizerManager) -> None:
    request = TextRequest(
        rid=f"health-{new_rid()}",
        input_ids=[0],
        sampling=SamplingParams(max_new_tokens=1, temperature=0.0),
        priority=PROBE_PRIORITY,
    )
    async with aclosing(manager.generate([request])) as updates:
        async for state in updates:
            raise_if_failed(state)


async def _progress(manager: TokenizerManager) -> None:
    """Wait for a token of any request, or for the end of a step: not all outputs are told of.

    Steps count from the first heartbeat from now on; the one before may be old.
    """
    received, old = manager.tokens_received, manager.scheduler_state
    steps: int | None = None
    while manager.tokens_received == received:
        if (reason := manager.unhealthy()) is not None:
            raise RequestError(reason, status=503)
        state = manager.scheduler_state
        if state is not old:
            now = state.get("num_steps", 0)
            if steps is not None and now > steps:
                return
            steps = now if steps is None else steps
        await asyncio.sleep(_POLL_SECONDS)
