"""One streamed request to an OpenAI- or SGLang-compatible server, timed chunk by chunk."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from benchmark.serving.metrics import RequestResult

Backend = Literal["sglang", "openai", "openai-completions"]
BACKENDS: tuple[Backend, ...] = ("sglang", "openai", "openai-completions")


class ServerError(RuntimeError):
    """The server refused or broke a request; the message is what it said."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. ``ignore_eos`` is an extension that SGLang and vLLM understand."""

    base_url: str
    backend: Backend
    model: str = ""
    ignore_eos: bool = True
    temperature: float = 0.0


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str


@dataclass
class StreamState:
    """What a stream has said so far."""

    text: str = ""
    output_ids: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    cached_tokens: int | None = None
    server_latency: float | None = None


def open_http(timeout_s: float, api_key: str | None = None) -> aiohttp.ClientSession:
    """A connection pool without a limit of its own. ``timeout_s`` bounds each whole request."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        # Servers drop idle connections (uvicorn after 5 s); one must not be used as that happens.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers=headers,
        # SGLang's chunks repeat the whole text, so single lines grow long.
        read_bufsize=4 << 20,
    )


async def send(
    http: aiohttp.ClientSession, endpoint: Endpoint, messages: Sequence[Message], max_tokens: int
) -> RequestResult:
    """Send a conversation and read the streamed reply. Failures are in the result's ``error``."""
    path, body, read = _request(endpoint, messages, max_tokens)
    return await stream(http, endpoint.base_url + path, body, read)


async def generate(
    http: aiohttp.ClientSession,
    base_url: str,
    prompt: str | Sequence[int],
    sampling_params: dict[str, Any],
) -> RequestResult:
    """Send one raw prompt (text or token ids) to ``/generate`` and read the streamed reply."""
    key = "text" if isinstance(prompt, str) else "input_ids"
    value = prompt if isinstance(prompt, str) else list(prompt)
    body = {key: value, "sampling_params": sampling_params, "stream": True}
    return await stream(http, base_url + "/generate", body, _read_sglang)


async def stream(
    http: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    read: Callable[[StreamState, dict[str, Any]], None],
) -> RequestResult:
    """POST ``body`` and fold every event into a result with ``read``."""
    state = StreamState()
    times: list[float] = []
    token_times: list[float] = []
    error: str | None = None
    start = time.perf_counter()
    try:
        async with http.post(url, json=body) as response:
            if response.status != 200:
                raise ServerError(f"HTTP {response.status}: {_message(await response.text())}")
            async for event in _events(response.content):
                if event.get("error"):
                    raise ServerError(_message(json.dumps(event)))
                length, tokens = len(state.text), state.completion_tokens
                read(state, event)
                if len(state.text) > length:
                    times.append(time.perf_counter())
                if state.completion_tokens > tokens:
                    token_times.append(time.perf_counter())
        if state.prompt_tokens is None:
            raise ServerError("the server reported no token counts (usage)")
    except TimeoutError:
        error = "timeout"
    except (ServerError, aiohttp.ClientError, ValueError, KeyError, TypeError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return RequestResult(
        start=start,
        end=time.perf_counter(),
        text_times=tuple(times),
        token_times=tuple(token_times),
        text=state.text,
        output_ids=state.output_ids,
        prompt_tokens=state.prompt_tokens or 0,
        completion_tokens=state.completion_tokens,
        cached_tokens=state.cached_tokens,
        server_latency=state.server_latency,
        error=error,
    )


async def model_name(http: aiohttp.ClientSession, base_url: str) -> str:
    """Return the first model that the server lists."""
    async with http.get(base_url + "/v1/models") as response:
        response.raise_for_status()
        reply = await response.json()
    return str(reply["data"][0]["id"])


async def flush_cache(http: aiohttp.ClientSession, base_url: str) -> None:
    async with http.post(base_url + "/flush_cache") as response:
        response.raise_for_status()


def transcript(messages: Sequence[Message]) -> str:
    """Render a conversation as raw text in which every prompt extends the one before it.

    A reply is continued without a separator of its own, so prompt + reply + next turn is
    exactly the next prompt and a prefix cache can match all of it.
    """
    parts = [
        f"assistant:{m.content}\n\n" if m.role == "assistant" else f"{m.role}: {m.content}\n\n"
        for m in messages
    ]
    return "".join(parts) + "assistant:"


def _request(
    endpoint: Endpoint, messages: Sequence[Message], max_tokens: int
) -> tuple[str, dict[str, Any], Callable[[StreamState, dict[str, Any]], None]]:
    if endpoint.backend == "sglang":
        sampling = {
            "max_new_tokens": max_tokens,
            "temperature": endpoint.temperature,
            "ignore_eos": endpoint.ignore_eos,
        }
        body = {"text": transcript(messages), "sampling_params": sampling, "stream": True}
        return "/generate", body, _read_sglang
    body = {
        "model": endpoint.model,
        "max_tokens": max_tokens,
        "temperature": endpoint.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if endpoint.ignore_eos:
        body["ignore_eos"] = True
    if endpoint.backend == "openai":
        body["messages"] = [{"role": m.role, "content": m.content} for m in messages]
        return "/v1/chat/completions", body, _read_chat
    body["prompt"] = transcript(messages)
    return "/v1/completions", body, _read_completion


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    async for line in content:
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return
        event: dict[str, Any] = json.loads(payload)
        yield event
    raise ServerError("the stream ended without [DONE]")


def _read_sglang(state: StreamState, event: dict[str, Any]) -> None:
    meta = event["meta_info"]
    finish = meta.get("finish_reason")
    if finish and finish["type"] == "abort":
        raise ServerError(f"aborted: {finish.get('message', '')}")
    state.text = event["text"]
    state.output_ids = tuple(event.get("output_ids", ()))
    state.prompt_tokens = meta["prompt_tokens"]
    state.completion_tokens = meta["completion_tokens"]
    state.cached_tokens = meta.get("cached_tokens")
    state.server_latency = meta.get("e2e_latency")


def _read_chat(state: StreamState, event: dict[str, Any]) -> None:
    for choice in event["choices"]:
        state.text += choice["delta"].get("content") or ""
    _read_usage(state, event)


def _read_completion(state: StreamState, event: dict[str, Any]) -> None:
    for choice in event["choices"]:
        state.text += choice.get("text") or ""
    _read_usage(state, event)


def _read_usage(state: StreamState, event: dict[str, Any]) -> None:
    usage = event.get("usage")
    if not usage:
        return
    state.prompt_tokens = usage["prompt_tokens"]
    state.completion_tokens = usage["completion_tokens"]
    details = usage.get("prompt_tokens_details") or {}
    state.cached_tokens = details.get("cached_tokens")


def _message(body: str) -> str:
    """The message inside an error body of either kind, or the start of the body."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200]
