"""The HTTP application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Route

from tca_runtime.config import RuntimeConfig
from tca_runtime.server.auth import ApiKeyMiddleware
from tca_runtime.server.backoff import Backoff
from tca_runtime.server.context import ServerContext
from tca_runtime.server.control import control_router
from tca_runtime.server.errors import install_error_handlers
from tca_runtime.server.info import info_router
from tca_runtime.server.metrics import Metrics
from tca_runtime.server.native import native_router
from tca_runtime.server.openai_chat import chat_router
from tca_runtime.server.openai_completions import completions_router
from tca_runtime.server.openapi import install_openapi
from tca_runtime.server.request_log import log_request
from tca_runtime.tokenizer.manager import TokenizerManager
from tca_runtime.tokenizer.state import RequestState

GENERATION_ROUTERS = (native_router, completions_router, chat_router)
ROUTERS = (*GENERATION_ROUTERS, info_router, control_router)


def build_app(config: RuntimeConfig, manager: TokenizerManager) -> FastAPI:
    """All routes over one manager, which starts and stops with the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        manager.start()
        yield
        await manager.stop()

    app = FastAPI(title="TCA runtime", version=version("tca-runtime"), lifespan=lifespan)
    metrics = Metrics(manager)
    backoff = Backoff()

    def observe(state: RequestState, new_tokens: int) -> None:
        metrics.observe(state, new_tokens)
        if state.finish is not None and state.finish.status != 503:
            backoff.note_end()
        log_request(state, new_tokens)

    manager.observer = observe
    context = ServerContext(config, manager, metrics)
    for build_router in ROUTERS:
        router = build_router(context)
        if build_router in GENERATION_ROUTERS:
            app.router.routes[:0] = _direct(router)
        app.include_router(router)
    install_error_handlers(app, metrics.count_refusal, backoff.refuse)
    install_openapi(app)
    if config.server.api_key or config.server.admin_api_key:
        app.add_middleware(ApiKeyMiddleware, args=config.server)
    return app


def _direct(router: APIRouter) -> list[Route]:
    """The same routes without FastAPI between them and the server.

    They read their request themselves, so it would only add to every reply's time, half a
    millisecond when it has to be fetched into the core's caches. It still describes them.
    """
    routes = [route for route in router.routes if isinstance(route, APIRoute)]
    return [Route(r.path, r.endpoint, methods=list(r.methods or ())) for r in routes]
