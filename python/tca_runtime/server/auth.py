"""The API key."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from tca_runtime.server.errors import error_response

_OPEN_PREFIXES = ("/health", "/metrics")


class ApiKeyMiddleware:
    """Refuses requests without ``Authorization: Bearer KEY``; probes and metrics stay open."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = b"Bearer " + api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_OPEN_PREFIXES):
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        response = error_response(scope["path"], "the API key is missing or wrong", 401)
        await response(scope, receive, send)
