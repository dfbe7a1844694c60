"""What the server says about itself: health, model, settings, load, metrics."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from tca_runtime.server.context import ServerContext, json_response
from tca_runtime.server.health import check_generation
from tca_runtime.server.loads import loads_report, router_load
from tca_runtime.server.metrics import scheduler_metrics
from tca_runtime.server.openapi import describe, list_of
from tca_runtime.server.replies import (
    Loads,
    ModelCard,
    ModelInfo,
    ModelList,
    RouterLoad,
    ServerInfo,
)
from tca_runtime.tokenizer.errors import RequestError

_STATE_SECONDS = 5.0
_MAX_TREE_NODES = 100_000
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def info_router(context: ServerContext) -> APIRouter:
    router = APIRouter()
    manager = context.manager
    card = _model_card(context)

    @router.get("/health", **describe("Whether the scheduler lives", text=True))
    async def health() -> Response:
        reason = manager.unhealthy()
        return Response(reason or "", 503 if reason else 200, media_type="text/plain")

    @router.get("/health_generate", **describe("Whether tokens are generated"))
    async def health_generate(http: Request) -> Response:
        await check_generation(http, manager)
        return Response(status_code=200)

    @router.get("/metrics", **describe("Prometheus metrics", text=True))
    async def show_metrics() -> Response:
        return Response(context.metrics.render(), media_type=_PROMETHEUS)

    @router.get("/v1/models", **describe("The model", reply=ModelList))
    async def models() -> Response:
        return json_response({"object": "list", "data": [card]})

    # A model's name may be a path.
    @router.get("/v1/models/{model_id:path}", **describe("A model", reply=ModelCard))
    async def model(model_id: str) -> Response:
        if model_id != manager.served_model_name:
            raise RequestError(f"there is no model {model_id!r}", status=404, param="model")
        return json_response(card)

    about_model = describe("What the model is", reply=ModelInfo)

    @router.get("/get_model_info", **about_model)
    @router.get("/model_info", **about_model)
    async def model_info() -> Response:
        return json_response(_model_info(context))

    about_server = describe("Settings and state", reply=ServerInfo)

    @router.get("/get_server_info", **about_server)
    @router.get("/server_info", **about_server)
    async def server_info() -> Response:
        return json_response(await _server_info(context))

    @router.get(
        "/tca/tree",
        **describe("The prefix tree, for people and tools", reply={"type": "object"}),
    )
    async def tree(
        limit: Annotated[int | None, Query(ge=1, le=_MAX_TREE_NODES)] = None,
    ) -> Response:
        args = {} if limit is None else {"limit": limit}
        return json_response((await manager.control("tree", args)).payload)

    @router.get("/get_load", **describe("Load, for routers", reply=list_of(RouterLoad)))
    async def get_load() -> Response:
        return json_response(router_load(manager.scheduler_state))

    @router.get("/v1/loads", **describe("Load in detail", reply=Loads, text=True))
    async def loads(
        include: str | None = None, dp_rank: int | None = None, format: str | None = None
    ) -> Response:
        if format not in (None, "json", "prometheus"):
            raise RequestError("format must be json or prometheus", param="format")
        report = loads_report(manager, include, dp_rank)
        if format == "prometheus":
            figures = scheduler_metrics(manager.scheduler_state)
            lines = [f'{name}{{dp_rank="0"}} {value}\n' for name, value in figures.items()]
            return Response("".join(lines), media_type=_PROMETHEUS)
        return json_response(report)

    return router


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
    del settings["api_key"], settings["admin_api_key"]
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
