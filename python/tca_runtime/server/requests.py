"""From checked fields to requests, and from requests to finished outputs."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request

from tca_runtime.messages import LogprobOptions
from tca_runtime.server.errors import raise_if_failed
from tca_runtime.server.sampling import check_token_ids
from tca_runtime.server.schemas import GenerateBody, OpenAIBody
from tca_runtime.server.sse import until_disconnect
from tca_runtime.tokenizer.call_limits import MAX_CALL_OUTPUTS
from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.manager import Limits, TokenizerManager
from tca_runtime.tokenizer.state import RequestState, TextRequest

# Logprobs per position, each way of asking.
MAX_LOGPROB_IDS = 1024
# Each of up to MAX_CALL_OUTPUTS outputs carries its names.
MAX_NAME_LENGTH = 1024
_NAMES = ("rid", "extra_key", "cache_salt", "user")


def check_names(body: GenerateBody | OpenAIBody) -> None:
    """Refuse names that are too long, alone or in a list."""
    for field in _NAMES:
        value = getattr(body, field)
        names = [value] if isinstance(value, str) else value or ()
        longest = max((len(name) for name in names if name is not None), default=0)
        if longest > MAX_NAME_LENGTH:
            text = f"{field} has {longest} characters, the limit is {MAX_NAME_LENGTH}"
            raise RequestError(text, param=field)


def new_rid() -> str:
    return uuid.uuid4().hex


def check_batch(name: str, count: int) -> None:
    """Refuse a batch before its prompts are tokenised."""
    if not 0 < count <= MAX_CALL_OUTPUTS:
        text = f"{name} has {count} prompts, the limit is {MAX_CALL_OUTPUTS}"
        raise RequestError(text if count else f"{name} is empty", param=name)


def prompts_of_ids(name: str, ids: Sequence[Any]) -> tuple[list[list[int]], bool]:
    """Prompts given as one list of token ids, or as a list of such lists."""
    if not ids:
        raise RequestError(f"{name} is empty", param=name)
    if all(isinstance(item, list) for item in ids):
        check_batch(name, len(ids))
        return list(ids), True
    if all(isinstance(item, int) for item in ids):
        return [list(ids)], False
    raise RequestError(f"{name} must not mix token ids and other things", param=name)


async def prompt_ids(
    manager: TokenizerManager, prompt: str | list[int], add_special_tokens: bool = True
) -> list[int]:
    """Token ids of one prompt, which may be given as ids already.

    Raises
    ------
    RequestError
        If it is empty, longer than the context, or has ids that the model does not know.
    """
    if isinstance(prompt, str):
        # Text that cannot fit is not worth the time that tokenising it would take.
        if len(prompt) > manager.limits.context_length * manager.encoder.characters_per_token:
            raise RequestError(
                f"the prompt has {len(prompt)} characters, which the context length of "
                f"{manager.limits.context_length} tokens cannot hold"
            )
        ids = await manager.encoder.encode(prompt, add_special_tokens)
    else:
        ids = prompt
        check_token_ids("input_ids", ids, manager.limits)
    if not ids:
        raise RequestError("the prompt is empty")
    if len(ids) > manager.limits.context_length:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, but the context length is "
            f"{manager.limits.context_length} tokens"
        )
    return ids


def logprob_options(
    start: int, top_k: int, token_ids: Sequence[int], prompt_tokens: int, limits: Limits
) -> LogprobOptions:
    """Checked logprob options; ``start`` is a position of the prompt or its length."""
    if not 0 <= start <= prompt_tokens:
        raise RequestError(
            f"logprob_start_len must be in [-1, {prompt_tokens}], the prompt's length, got {start}",
            param="logprob_start_len",
        )
    most = min(limits.vocab_size, MAX_LOGPROB_IDS)
    if not 0 <= top_k <= most:
        raise RequestError(
            f"top_logprobs_num must be in [0, {most}], got {top_k}", param="top_logprobs_num"
        )
    if len(token_ids) > MAX_LOGPROB_IDS:
        raise RequestError(
            f"token_ids_logprob has {len(token_ids)} ids, the limit is {MAX_LOGPROB_IDS}",
            param="token_ids_logprob",
        )
    check_token_ids("token_ids_logprob", token_ids, limits)
    return LogprobOptions(start=start, top_k=top_k, token_ids=tuple(token_ids))


async def finished_outputs(
    http: Request, manager: TokenizerManager, requests: Sequence[TextRequest]
) -> list[RequestState]:
    """Run requests to their end; the outputs in order.

    Raises
    ------
    RequestError
        If one of them fails; the others are aborted.
    ClientGone
        If the client disconnects; all are aborted.
    """
    return await until_disconnect(http.receive, _collect(manager, requests))


async def _collect(
    manager: TokenizerManager, requests: Sequence[TextRequest]
) -> list[RequestState]:
    finished: list[RequestState] = []
    async with aclosing(manager.generate(requests)) as updates:
        async for state in updates:
            raise_if_failed(state)
            if state.finish is not None:
                finished.append(state)
    return sorted(finished, key=lambda state: state.index)
