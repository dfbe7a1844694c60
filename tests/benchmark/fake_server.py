"""A server that speaks both protocols over SSE, with one 'token' per word, in a thread."""

from __future__ import annotations

import asyncio
import json
import threading
from types import TracebackType
from typing import Any

from aiohttp import web

Json = dict[str, Any]


class FakeServer:
    """Echoes ``r0 r1 ...``; a prompt containing ``!name`` provokes that failure.

    Cached tokens are the longest common word prefix with an earlier prompt or its reply, or
    always 0 without ``caching``. Output ids count up from ``first_id``.
    """

    def __init__(self, caching: bool = True, first_id: int = 0) -> None:
        self.caching = caching
        self.first_id = first_id
        self.bodies: list[Json] = []
        self.seen: list[list[str]] = []
        self.most_in_flight = 0
        self.flushes = 0
        self._in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.url = ""

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/flush_cache", self._flush)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake-model"}]})

    async def _flush(self, request: web.Request) -> web.Response:
        self.flushes += 1
        self.seen.clear()
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["text"] if "text" in body else " ".join(map(str, body["input_ids"]))
        count = body["sampling_params"]["max_new_tokens"]
        words, cached = self._accept(body, prompt, count)
        text = ""
        events: list[Json] = []
        for i in range(count):
            text += f" r{i}"
            meta = {
                "prompt_tokens": len(words),
                "completion_tokens": i + 1,
                "cached_tokens": cached,
                "e2e_latency": 0.25,
                "finish_reason": {"type": "length", "length": count} if i + 1 == count else None,
            }
            events.append(
                {
                    "text": text,
                    "output_ids": [self.first_id + k for k in range(i + 1)],
                    "meta_info": meta,
                }
            )
        if "!abort" in prompt:
            finish = {"type": "abort", "message": "out of memory"}
            events[-1]["meta_info"]["finish_reason"] = finish
        return await self._reply(request, prompt, events)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = " ".join(f"{m['role']}: {m['content']}" for m in body["messages"]) + " assistant:"
        count = body["max_tokens"]
        pieces: list[Json] = [{"delta": {"role": "assistant", "content": ""}}]
        pieces += [{"delta": {"content": f" r{i}"}} for i in range(count)]
        return await self._openai(request, body, prompt, count, pieces)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        pieces = [{"text": f" r{i}"} for i in range(body["max_tokens"])]
        return await self._openai(request, body, body["prompt"], body["max_tokens"], pieces)

    async def _openai(
        self, request: web.Request, body: Json, prompt: str, count: int, pieces: list[Json]
    ) -> web.StreamResponse:
        words, cached = self._accept(body, prompt, count)
        events: list[Json] = [{"choices": [{"index": 0, **piece}]} for piece in pieces]
        usage = {
            "prompt_tokens": len(words),
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if "!no-usage" not in prompt:
            events.append({"choices": [], "usage": usage})
        return await self._reply(request, prompt, events)

    def _accept(self, body: Json, prompt: str, count: int) -> tuple[list[str], int]:
        words = prompt.split()
        self.bodies.append(body)
        cached = max((_common(words, earlier) for earlier in self.seen), default=0)
        if self.caching:
            self.seen.append(words + [f"r{i}" for i in range(count)])
        return words, cached

    async def _reply(
        self, request: web.Request, prompt: str, events: list[Json]
    ) -> web.StreamResponse:
        if "!http" in prompt:
            return web.json_response({"error": {"message": "prompt too long"}}, status=400)
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for event in events:
                await response.write(f"data: {json.dumps(event)}\n\n".encode())
                await asyncio.sleep(0.001)
            if "!stream-error" in prompt:
                await response.write(b'data: {"error": {"message": "engine died"}}\n\n')
            if "!no-done" not in prompt:
                await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self._in_flight -= 1


def _common(left: list[str], right: list[str]) -> int:
    size = min(len(left), len(right))
    return next((i for i in range(size) if left[i] != right[i]), size)
