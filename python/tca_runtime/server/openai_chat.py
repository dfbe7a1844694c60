"""``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
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
from tca_runtime.server.replies import ChatReply
from tca_runtime.server.requests import check_names, finished_outputs, new_rid, prompt_ids
from tca_runtime.server.schemas import ChatBody
from tca_runtime.server.sse import event, stream_reply
from tca_runtime.server.tools import ToolCall, ToolParser, ToolPlan, plan_tools
from tca_runtime.tokenizer.detokenizer import TokenTable
from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.manager import TokenizerManager
from tca_runtime.tokenizer.state import LogprobEntry, RequestState, TextRequest

# Rendering more of them holds other clients up, so it goes to a thread.
_INLINE_MESSAGES = 256

_decoder = msgspec.json.Decoder(ChatBody)


@dataclass(frozen=True)
class _Call:
    """One client's call."""

    request: TextRequest
    model: str
    plan: ToolPlan
    include_usage: bool


class _Choice:
    """What a choice has shown of its output."""

    def __init__(self, call: _Call) -> None:
        self.parser = ToolParser(call.plan) if call.plan.names else None
        self.characters = 0
        self.tokens = 0
        self.calls = 0

    def parts(self, state: RequestState) -> list[str | ToolCall]:
        """New content and calls."""
        text = state.text[self.characters :]
        self.characters = len(state.text)
        if self.parser is None:
            return [text] if text else []
        parts = self.parser.feed(text)
        if state.finish is not None:
            parts += self.parser.finish()
        self.calls += sum(isinstance(part, ToolCall) for part in parts)
        return parts

    def finish_reason(self, state: RequestState) -> str | None:
        name = finish_name(state)
        return "tool_calls" if name == "stop" and self.calls else name


def chat_router(context: ServerContext) -> APIRouter:
    router = APIRouter()
    table = context.manager.table

    @router.post(
        "/v1/chat/completions",
        **describe("Answer a conversation", body=ChatBody, reply=ChatReply, streams=True),
    )
    async def chat_completions(http: Request) -> Response:
        body = await context.read(http, _decoder)
        call = await _prepare(http, body, context)
        if body.stream:
            return await stream_reply(http, _events(call, context.manager))
        states = await finished_outputs(http, context.manager, [call.request])
        return json_response(
            {
                **envelope("chat.completion", call.request.rid, call.model),
                "choices": [_whole_choice(call, state, table) for state in states],
                "usage": usage(states, len(states)),
            }
        )

    return router


async def _prepare(http: Request, body: ChatBody, context: ServerContext) -> _Call:
    arrived = time.perf_counter()
    manager = context.manager
    check_names(body)
    namespace = cache_namespace(body.extra_key, body.cache_salt)
    plan = plan_tools(body.tools, body.tool_choice, body.parallel_tool_calls is not False)
    render = partial(
        manager.chat_template.render,
        body.messages,
        plan.offered,
        body.chat_template_kwargs,
        bool(body.continue_final_message),
    )
    is_long = len(body.messages) > _INLINE_MESSAGES
    prompt = await asyncio.to_thread(render) if is_long else render()
    ids = await prompt_ids(manager, prompt, add_special_tokens=False)
    max_tokens = (
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    )
    samplings = openai_sampling(body, max_tokens, manager.limits, plan.schema)
    request = TextRequest(
        rid=body.rid or f"chatcmpl-{new_rid()}",
        input_ids=ids,
        sampling=samplings.for_prompt(len(ids)),
        logprobs=_options(body, len(ids)),
        logprob_text=True,
        extra_key=namespace,
        priority=body.priority or 0,
        stream=bool(body.stream),
        client=client_name(http, body.user, namespace),
        arrived=arrived,
    )
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return _Call(request, context.manager.served_model_name, plan, include_usage)


def _options(body: ChatBody, prompt_tokens: int) -> LogprobOptions | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return None
    check_top_logprobs("top_logprobs", body.top_logprobs or 0)
    return LogprobOptions(start=prompt_tokens, top_k=body.top_logprobs or 0)


def _whole_choice(call: _Call, state: RequestState, table: TokenTable) -> dict[str, Any]:
    shown = _Choice(call)
    parts = shown.parts(state)
    content = "".join(part for part in parts if isinstance(part, str))
    calls = [_tool_call(part) for part in parts if isinstance(part, ToolCall)]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    return {
        "index": state.index,
        "message": message,
        "logprobs": _logprobs(state, shown, table),
        "finish_reason": shown.finish_reason(state),
        **finish_fields(state),
    }


async def _events(call: _Call, manager: TokenizerManager) -> AsyncGenerator[bytes, None]:
    head = envelope("chat.completion.chunk", call.request.rid, call.model)
    shown: dict[int, _Choice] = {}
    states: dict[int, RequestState] = {}
    async with aclosing(manager.generate([call.request])) as updates:
        async for state in updates:
            raise_if_failed(state)
            states[state.index] = state
            if state.index not in shown:
                shown[state.index] = _Choice(call)
                yield _chunk(head, state.index, {"role": "assistant", "content": ""})
            choice = shown[state.index]
            for delta, logprobs in _deltas(choice, state, manager.table):
                yield _chunk(head, state.index, delta, logprobs)
            if state.finish is not None:
                yield _chunk(head, state.index, {}, None, choice.finish_reason(state), state)
    if call.include_usage:
        ordered = [states[i] for i in sorted(states)]
        yield event({**head, "choices": [], "usage": usage(ordered, len(ordered))})


def _deltas(
    choice: _Choice, state: RequestState, table: TokenTable
) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    calls = choice.calls
    parts = choice.parts(state)
    logprobs = _logprobs(state, choice, table)
    deltas = []
    for part in parts:
        if isinstance(part, ToolCall):
            delta: dict[str, Any] = {"tool_calls": [{"index": calls, **_tool_call(part)}]}
            calls += 1
        else:
            delta = {"content": part}
        deltas.append((delta, logprobs))
        logprobs = None
    if not deltas and logprobs is not None and logprobs["content"]:
        deltas.append(({"content": ""}, logprobs))
    return deltas


def _chunk(
    head: dict[str, Any],
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
    finished: RequestState | None = None,
) -> bytes:
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }
    if finished is not None:
        choice |= finish_fields(finished)
    return event({**head, "choices": [choice]})


def _tool_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _logprobs(state: RequestState, shown: _Choice, table: TokenTable) -> dict[str, Any] | None:
    if state.request.logprobs is None:
        return None
    begin, end = shown.tokens, state.text_tokens
    shown.tokens = end
    tops = state.logprobs.output_top[begin:end]
    return {
        "content": [
            {
                **_token_logprob(entry, table),
                "top_logprobs": [_token_logprob(top, table) for top in tops[i] or ()]
                if i < len(tops)
                else [],
            }
            for i, entry in enumerate(state.logprobs.output[begin:end])
        ]
    }


def _token_logprob(entry: LogprobEntry, table: TokenTable) -> dict[str, Any]:
    logprob, token_id, text = entry
    return {"token": text, "logprob": logprob, "bytes": list(table.bytes_of(token_id))}
