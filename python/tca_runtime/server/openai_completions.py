"""``/v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from tca_runtime.messages import LogprobOptions
from tca_runtime.server.context import ServerContext, json_response
from tca_runtime.server.errors import raise_if_failed
from tca_runtime.server.identity import cache_namespace, client_name
from tca_runtime.server.openai_common import (
    check_top_logprobs,
    envelope,
    finish_fields,
    finish_name,
    openai_sampling,
    usage,
)
from tca_runtime.server.openapi import describe
from tca_runtime.server.replies import CompletionReply
from tca_runtime.server.requests import (
    check_batch,
    check_names,
    finished_outputs,
    new_rid,
    prompt_ids,
    prompts_of_ids,
)
from tca_runtime.server.schemas import CompletionBody
from tca_runtime.server.sse import event, stream_reply
from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.manager import TokenizerManager
from tca_runtime.tokenizer.state import LogprobEntry, RequestState, TextRequest

DEFAULT_MAX_TOKENS = 16

_decoder = msgspec.json.Decoder(CompletionBody)


@dataclass(frozen=True)
class _Call:
    """One client's call: its requests and what the choices show beside the new text."""

    reply_id: str
    model: str
    requests: list[TextRequest]
    prompts: list[str]
    samples: int
    echo: bool
    logprobs: int | None
    include_usage: bool


@dataclass
class _Shown:
    """What a choice has shown of its output; ``offset`` is where its next token's text begins."""

    started: bool = False
    characters: int = 0
    tokens: int = 0
    offset: int = 0


def completions_router(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/completions",
        **describe("Complete texts", body=CompletionBody, reply=CompletionReply, streams=True),
    )
    async def completions(http: Request) -> Response:
        body = await context.read(http, _decoder)
        call = await _prepare(http, body, context)
        if body.stream:
            return await stream_reply(http, _events(call, context.manager))
        states = await finished_outputs(http, context.manager, call.requests)
        return json_response(
            {
                **envelope("text_completion", call.reply_id, call.model),
                "choices": [_choice(call, state, _Shown()) for state in states],
                "usage": usage(states, call.samples),
            }
        )

    return router


async def _prepare(http: Request, body: CompletionBody, context: ServerContext) -> _Call:
    arrived = time.perf_counter()
    manager = context.manager
    check_names(body)
    namespace = cache_namespace(body.extra_key, body.cache_salt)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of must equal n", param="best_of")
    if body.logprobs is not None:
        check_top_logprobs("logprobs", body.logprobs)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    reply_id = body.rid or f"cmpl-{new_rid()}"
    prompts = _prompts(body)
    samplings = openai_sampling(body, max_tokens, manager.limits)
    requests, texts = [], []
    for i, prompt in enumerate(prompts):
        ids = await prompt_ids(manager, prompt)
        sampling = samplings.for_prompt(len(ids))
        requests.append(
            TextRequest(
                rid=reply_id if len(prompts) == 1 else f"{reply_id}_{i}",
                input_ids=ids,
                sampling=sampling,
                logprobs=_options(body, len(ids)),
                logprob_text=True,
                extra_key=namespace,
                priority=body.priority or 0,
                stream=bool(body.stream),
                client=client_name(http, body.user, namespace),
                arrived=arrived,
                part_of=(reply_id,) if len(prompts) > 1 else (),
            )
        )
        if body.echo:
            texts.append(prompt if isinstance(prompt, str) else _decode(manager, ids))
    return _Call(
        reply_id=reply_id,
        model=context.manager.served_model_name,
        requests=requests,
        prompts=texts,
        samples=requests[0].sampling.n,
        echo=bool(body.echo),
        logprobs=body.logprobs,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def _prompts(body: CompletionBody) -> Sequence[str | list[int]]:
    if isinstance(body.prompt, str):
        return [body.prompt]
    if body.prompt and all(isinstance(item, str) for item in body.prompt):
        check_batch("prompt", len(body.prompt))
        return [str(item) for item in body.prompt]
    return prompts_of_ids("prompt", body.prompt)[0]


def _options(body: CompletionBody, prompt_tokens: int) -> LogprobOptions | None:
    if body.logprobs is None:
        return None
    return LogprobOptions(start=0 if body.echo else prompt_tokens, top_k=body.logprobs)


def _decode(manager: TokenizerManager, ids: list[int]) -> str:
    return b"".join(map(manager.table.bytes_of, ids)).decode("utf-8", "replace")


async def _events(call: _Call, manager: TokenizerManager) -> AsyncGenerator[bytes, None]:
    head = envelope("text_completion", call.reply_id, call.model)
    shown: dict[int, _Shown] = {}
    states: dict[int, RequestState] = {}
    async with aclosing(manager.generate(call.requests)) as updates:
        async for state in updates:
            raise_if_failed(state)
            states[state.index] = state
            choice = _choice(call, state, shown.setdefault(state.index, _Shown()))
            yield event({**head, "choices": [choice]})
    if call.include_usage:
        ordered = [states[i] for i in sorted(states)]
        yield event({**head, "choices": [], "usage": usage(ordered, call.samples)})


def _choice(call: _Call, state: RequestState, shown: _Shown) -> dict[str, Any]:
    text = state.text[shown.characters :]
    shown.characters = len(state.text)
    echo = call.echo and not shown.started
    shown.started = True
    if echo:
        text = call.prompts[state.index // call.samples] + text
    return {
        "index": state.index,
        "text": text,
        "logprobs": None if call.logprobs is None else _logprobs(call, state, shown, echo),
        "finish_reason": finish_name(state),
        **finish_fields(state),
    }


def _logprobs(call: _Call, state: RequestState, shown: _Shown, echo: bool) -> dict[str, Any]:
    have = state.logprobs
    entries = have.output[shown.tokens : state.text_tokens]
    tops = have.output_top[shown.tokens : state.text_tokens]
    if echo:
        entries = [*have.input, *entries]
        tops = [*have.input_top, *tops]
    shown.tokens = state.text_tokens
    tokens = [entry[2] or "" for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(shown.offset)
        shown.offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [entry[0] for entry in entries],
        "top_logprobs": [_top(top) for top in tops] if call.logprobs else None,
        "text_offset": offsets,
    }


def _top(entries: list[LogprobEntry] | None) -> dict[str, float | None] | None:
    if entries is None:
        return None
    best: dict[str, float | None] = {}
    for logprob, _, text in entries:
        best.setdefault(text or "", logprob)
    return best
