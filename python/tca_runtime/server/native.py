"""``/generate``: SGLang's own route."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response

from tca_runtime.server.context import ServerContext, json_response
from tca_runtime.server.errors import raise_if_failed
from tca_runtime.server.identity import cache_namespace, client_name
from tca_runtime.server.openapi import GENERATE
from tca_runtime.server.requests import (
    check_batch,
    check_names,
    finished_outputs,
    logprob_options,
    new_rid,
    prompt_ids,
    prompts_of_ids,
)
from tca_runtime.server.sampling import SamplingTemplate, check_int64
from tca_runtime.server.schemas import GenerateBody, SamplingBody, check_supported
from tca_runtime.server.sse import event, stream_reply
from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.manager import Limits, TokenizerManager
from tca_runtime.tokenizer.state import RequestState, TextRequest

T = TypeVar("T")

_decoder = msgspec.json.Decoder(GenerateBody)


def native_router(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.post("/generate", **GENERATE)
    @router.put("/generate", **GENERATE)
    async def generate(http: Request) -> Response:
        body = await context.read(http, _decoder)
        requests, is_batch = await text_requests(http, body, context.manager)
        if body.stream:
            events = _events(context.manager, requests, is_batch)
            return await stream_reply(http, events)
        states = await finished_outputs(http, context.manager, requests)
        replies = [native_reply(state) for state in states]
        return json_response(replies if is_batch else replies[0])

    return router


async def text_requests(
    http: Request, body: GenerateBody, manager: TokenizerManager
) -> tuple[list[TextRequest], bool]:
    """The requests of a body, and whether the reply is a list."""
    arrived = time.perf_counter()
    check_names(body)
    prompts, is_batch = _prompts(body)
    count = len(prompts)
    samplings = _samplings(body, count, is_batch, manager.limits)
    wants = _per_item("return_logprob", body.return_logprob, count, is_batch)
    starts = _per_item("logprob_start_len", body.logprob_start_len, count, is_batch)
    tops = _per_item("top_logprobs_num", body.top_logprobs_num, count, is_batch)
    token_ids = _token_ids_logprob(body, count, is_batch)
    extra_keys = _per_item("extra_key", body.extra_key, count, is_batch)
    salts = _per_item("cache_salt", body.cache_salt, count, is_batch)
    rids = _rids(body, count, is_batch)
    check_int64("priority", body.priority or 0)
    requests = []
    for i, prompt in enumerate(prompts):
        ids = await prompt_ids(manager, prompt)
        sampling = samplings[i].for_prompt(len(ids))
        start = starts[i]
        if start is None or start == -1:
            start = 0 if sampling.max_new_tokens == 0 else len(ids)
        namespace = cache_namespace(extra_keys[i], salts[i])
        options = logprob_options(start, tops[i] or 0, token_ids[i], len(ids), manager.limits)
        requests.append(
            TextRequest(
                rid=rids[i],
                input_ids=ids,
                sampling=sampling,
                logprobs=options if wants[i] else None,
                logprob_text=bool(body.return_text_in_logprobs),
                extra_key=namespace,
                priority=body.priority or 0,
                stream=bool(body.stream),
                client=client_name(http, body.user, namespace),
                arrived=arrived,
                part_of=(body.rid,) if is_batch and isinstance(body.rid, str) else (),
            )
        )
    return requests, is_batch or any(r.sampling.n > 1 for r in requests)


def native_reply(state: RequestState) -> dict[str, Any]:
    """An output in SGLang's shape; ``text`` and ``output_ids`` are cumulative."""
    meta: dict[str, Any] = {
        "id": state.request.rid,
        "finish_reason": _finish_reason(state),
        "prompt_tokens": state.prompt_tokens,
        "completion_tokens": len(state.output_ids),
        "cached_tokens": state.cached_tokens,
        "weight_version": "default",
        "num_retractions": state.num_retractions,
    }
    if state.request.logprobs is not None:
        meta |= _logprob_meta(state)
    if state.finish is not None:
        meta["e2e_latency"] = state.latency
    if state.tca is not None:
        meta["tca"] = state.tca
    return {"text": state.text, "output_ids": state.output_ids, "meta_info": meta}


def _finish_reason(state: RequestState) -> dict[str, Any] | None:
    finish = state.finish
    if finish is None:
        return None
    if finish.type == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.type == "length":
        return {"type": "length", "length": len(state.output_ids)}
    return {
        "type": "abort",
        "message": finish.message,
        "status_code": finish.status or None,
        "err_type": None,
    }


def _logprob_meta(state: RequestState) -> dict[str, Any]:
    options, logprobs = state.request.logprobs, state.logprobs
    assert options is not None
    meta: dict[str, Any] = {
        "input_token_logprobs": logprobs.input,
        "output_token_logprobs": logprobs.output,
        "output_token_logprobs_length": len(logprobs.output),
    }
    if options.top_k:
        meta["input_top_logprobs"] = logprobs.input_top
        meta["output_top_logprobs"] = logprobs.output_top
    if options.token_ids:
        meta["input_token_ids_logprobs"] = logprobs.input_ids
        meta["output_token_ids_logprobs"] = logprobs.output_ids
    return meta


async def _events(
    manager: TokenizerManager, requests: Sequence[TextRequest], is_batch: bool
) -> AsyncGenerator[bytes, None]:
    async with aclosing(manager.generate(requests)) as updates:
        async for state in updates:
            raise_if_failed(state)
            reply = native_reply(state)
            if is_batch:
                reply["index"] = state.index
            yield event(reply)


def _prompts(body: GenerateBody) -> tuple[Sequence[str | list[int]], bool]:
    check_supported(body)
    if (body.text is None) == (body.input_ids is None):
        raise RequestError("give either text or input_ids")
    if body.text is not None:
        if isinstance(body.text, str):
            return [body.text], False
        check_batch("text", len(body.text))
        return body.text, True
    return prompts_of_ids("input_ids", body.input_ids or [])


def _per_item(
    name: str, value: T | Sequence[T | None] | None, count: int, is_batch: bool
) -> Sequence[T | None]:
    if not isinstance(value, list):
        return [value] * count  # type: ignore[list-item]
    if not is_batch:
        raise RequestError(f"{name} must not be a list for a single prompt", param=name)
    if len(value) != count:
        raise RequestError(
            f"{name} has {len(value)} items for a batch of {count} prompts", param=name
        )
    return value


def _samplings(
    body: GenerateBody, count: int, is_batch: bool, limits: Limits
) -> Sequence[SamplingTemplate]:
    if not isinstance(body.sampling_params, list):
        return [SamplingTemplate(body.sampling_params or SamplingBody(), limits)] * count
    bodies: SamplingBody | Sequence[SamplingBody | None] | None = body.sampling_params
    given = _per_item("sampling_params", bodies, count, is_batch)
    return [SamplingTemplate(item or SamplingBody(), limits) for item in given]


def _token_ids_logprob(body: GenerateBody, count: int, is_batch: bool) -> list[list[int]]:
    value = body.token_ids_logprob
    if isinstance(value, list) and any(isinstance(item, list) for item in value):
        items: Sequence[Any] = _per_item("token_ids_logprob", value, count, is_batch)
    else:
        items = [value] * count
    ids = [[item] if isinstance(item, int) else item or [] for item in items]
    return [[token_id for token_id in item if token_id is not None] for item in ids]


def _rids(body: GenerateBody, count: int, is_batch: bool) -> list[str]:
    if isinstance(body.rid, str) and is_batch:
        return [f"{body.rid}_{i}" for i in range(count)]
    given = _per_item("rid", body.rid, count, is_batch)
    return [rid or new_rid() for rid in given]
