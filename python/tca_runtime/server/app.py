"""The HTTP application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

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

ROUTERS = (native_router, completions_router, chat_router, info_router, control_router)


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
    for router in ROUTERS:
        app.include_router(router(context))
    install_error_handlers(app, metrics.count_refusal, backoff.refuse)
    install_openapi(app)
    if config.server.api_key or config.server.admin_api_key:
        app.add_middleware(ApiKeyMiddleware, args=config.server)
    return app
