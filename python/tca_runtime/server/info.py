"""What the server says about itself: health, model, settings, load, metrics."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from tca_runtime.sampling_params import SamplingParams
from tca_runtime.server.context import ServerContext, json_response
from tca_runtime.server.metrics import Metrics, load_figures
from tca_runtime.server.requests import finished_outputs, new_rid
from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.state import TextRequest

_DEEP_HEALTH_SECONDS = 20.0
_STATE_SECONDS = 5.0
_MAX_TREE_NODES = 100_000


def info_router(context: ServerContext) -> APIRouter:
    router = APIRouter()
    manager = context.manager
    card = _model_card(context)
    metrics = Metrics(manager)

    @router.get("/health")
    async def health() -> Response:
        reason = manager.unhealthy()
        return Response(reason or "", 503 if reason else 200, media_type="text/plain")

    @router.get("/health_generate")
    async def health_generate(http: Request) -> Response:
        try:
            async with asyncio.timeout(_DEEP_HEALTH_SECONDS):
                await finished_outputs(http, manager, [_health_request()])
        except TimeoutError:
            raise RequestError("no token came in time", status=503) from None
        return Response(status_code=200)

    @router.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [card]})

    # A model's name may be a path.
    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        if model_id != manager.served_model_name:
            raise RequestError(f"there is no model {model_id!r}", status=404, param="model")
        return json_response(card)

    @router.get("/get_model_info")
    @router.get("/model_info")
    async def model_info() -> Response:
        return json_response(_model_info(context))

    @router.get("/get_server_info")
    @router.get("/server_info")
    async def server_info() -> Response:
        return json_response(await _server_info(context))

    @router.get("/tca/tree")
    async def tree(http: Request) -> Response:
        limit = http.query_params.get("limit")
        args = {} if limit is None else {"limit": _tree_limit(limit)}
        return json_response((await manager.control("tree", args)).payload)

    @router.get("/get_load")
    async def get_load() -> Response:
        return json_response([_router_load(load_figures(manager.scheduler_state))])

    @router.get("/v1/loads")
    async def loads() -> Response:
        now = datetime.now(UTC).isoformat()
        load = {"timestamp": now, "dp_rank": 0, **load_figures(manager.scheduler_state)}
        return json_response(
            {
                "timestamp": now,
                "version": version("tca-runtime"),
                "accelerator": manager.info.get("device"),
                "num_accelerators": 1,
                "loads": [load],
            }
        )

    return router


def _health_request() -> TextRequest:
    sampling = SamplingParams(max_new_tokens=1, temperature=0.0)
    return TextRequest(rid=f"health-{new_rid()}", input_ids=[0], sampling=sampling)


def _model_card(context: ServerContext) -> dict[str, Any]:
    return {
        "id": context.manager.served_model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "tca-runtime",
        "root": context.config.model.model_path,
        "max_model_len": context.manager.limits.context_length,
    }


def _model_info(context: ServerContext) -> dict[str, Any]:
    model, info = context.config.model, context.manager.info
    return {
        "model_path": model.model_path,
        "tokenizer_path": model.tokenizer_path or model.model_path,
        "served_model_name": context.manager.served_model_name,
        "is_generation": True,
        "weight_version": "default",
        "load_format": model.load_format,
        "model_type": info.get("model_type"),
        "architectures": info.get("architectures"),
    }


async def _server_info(context: ServerContext) -> dict[str, Any]:
    """The settings, what became of them, and the scheduler's state, in one flat object."""
    manager = context.manager
    settings: dict[str, Any] = {}
    for group in asdict(context.config).values():
        settings |= group
    del settings["api_key"]
    try:
        state = (await manager.control("state", timeout=_STATE_SECONDS)).payload
    except RequestError:
        state = manager.scheduler_state
    return {
        **settings,
        **manager.info,
        "served_model_name": manager.served_model_name,
        "tp_size": 1,
        "dp_size": 1,
        "version": version("tca-runtime"),
        **state,
        "internal_states": [state],
    }


def _router_load(load: dict[str, Any]) -> dict[str, Any]:
    waiting = load["num_waiting_reqs"]
    return {
        "dp_rank": 0,
        "num_reqs": load["num_running_reqs"] + waiting,
        "num_waiting_reqs": waiting,
        "num_tokens": load["num_used_tokens"] + load["num_waiting_uncached_tokens"],
    }


def _tree_limit(text: str) -> int:
    if len(text) > 6 or not text.isdecimal() or not 1 <= int(text) <= _MAX_TREE_NODES:
        raise RequestError(f"limit must be an integer in [1, {_MAX_TREE_NODES}]", param="limit")
    return int(text)
