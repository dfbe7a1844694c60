"""The HTTP application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from tca_runtime.config import RuntimeConfig
from tca_runtime.server.auth import ApiKeyMiddleware
from tca_runtime.server.context import ServerContext
from tca_runtime.server.control import control_router
from tca_runtime.server.errors import install_error_handlers
from tca_runtime.server.info import info_router
from tca_runtime.server.native import native_router
from tca_runtime.server.openai_chat import chat_router
from tca_runtime.server.openai_completions import completions_router
from tca_runtime.tokenizer.manager import TokenizerManager


def build_app(config: RuntimeConfig, manager: TokenizerManager) -> FastAPI:
    """All routes over one manager, which starts and stops with the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        manager.start()
        yield
        await manager.stop()

    app = FastAPI(title="TCA runtime", version=version("tca-runtime"), lifespan=lifespan)
    context = ServerContext(config, manager)
    for router in (native_router, completions_router, chat_router, info_router, control_router):
        app.include_router(router(context))
    install_error_handlers(app)
    if config.server.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=config.server.api_key)
    return app
