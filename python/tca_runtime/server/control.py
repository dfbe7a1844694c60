"""Commands about the server as a whole: flush, abort, profile."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from tca_runtime.messages import ControlReply
from tca_runtime.server.context import ServerContext
from tca_runtime.server.openapi import describe
from tca_runtime.server.schemas import AbortBody, ProfileBody, parse, read_body
from tca_runtime.tokenizer.errors import RequestError

# Writing a trace of a long recording takes a while.
_STOP_PROFILE_SECONDS = 300.0
_MAX_PROFILED_STEPS = 100_000

_PROFILE_BODY = describe(
    "Begin to record a trace", body=ProfileBody, body_required=False, text=True
)
_abort_decoder = msgspec.json.Decoder(AbortBody)
_profile_decoder = msgspec.json.Decoder(ProfileBody)


def control_router(context: ServerContext) -> APIRouter:
    router = APIRouter()
    manager = context.manager

    flush = describe("Empty the prefix cache", text=True)

    @router.get("/flush_cache", **flush)
    @router.post("/flush_cache", **flush)
    async def flush_cache() -> Response:
        return _text_reply(await manager.control("flush_cache"))

    @router.post("/abort_request", **describe("End requests early", body=AbortBody))
    async def abort_request(http: Request) -> Response:
        body = await context.read(http, _abort_decoder)
        if not body.rid and not body.abort_all:
            raise RequestError("give a rid or abort_all: true", param="rid")
        manager.abort("" if body.abort_all else body.rid or "")
        return Response(status_code=200)

    start = describe("Begin to record a trace", text=True)

    @router.get("/start_profile", **start)
    @router.post("/start_profile", **start | _PROFILE_BODY)
    async def start_profile(http: Request) -> Response:
        raw = await read_body(http, context.config.server.max_body_bytes)
        body = parse(raw, _profile_decoder) if raw.strip() else ProfileBody()
        args: dict[str, object] = {"output_dir": body.output_dir} if body.output_dir else {}
        if body.num_steps is not None:
            if not 1 <= body.num_steps <= _MAX_PROFILED_STEPS:
                text = f"num_steps must be in [1, {_MAX_PROFILED_STEPS}], got {body.num_steps}"
                raise RequestError(text, param="num_steps")
            args["num_steps"] = body.num_steps
        return _text_reply(await manager.control("start_profile", args))

    stop = describe("End the recording and write the trace", text=True)

    @router.get("/stop_profile", **stop)
    @router.post("/stop_profile", **stop)
    async def stop_profile() -> Response:
        return _text_reply(await manager.control("stop_profile", timeout=_STOP_PROFILE_SECONDS))

    return router


def _text_reply(reply: ControlReply) -> Response:
    if not reply.ok:
        raise RequestError(reply.message)
    return Response(reply.message + "\n", media_type="text/plain")
