"""API keys: who may call, and as whom."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from tca_runtime.config import ServerArgs
from tca_runtime.server.errors import error_response

# Probes and scrapers come without a key.
OPEN_PATHS = frozenset({"/health", "/health_generate", "/metrics"})
# They act on other clients' requests, show what these have cached, or write files.
ADMIN_PATHS = frozenset(
    {"/flush_cache", "/abort_request", "/start_profile", "/stop_profile", "/tca/tree"}
)


class ApiKeyMiddleware:
    """Refuses requests without ``Authorization: Bearer KEY``.

    ``--api-key`` is one key or several, separated by commas; each is a client of its own when the
    server is shared fairly. With an ``--admin-api-key``, only that one opens ``ADMIN_PATHS``; it
    opens everything else as well. With only an admin key the rest needs none.
    """

    def __init__(self, app: ASGIApp, args: ServerArgs) -> None:
        self._app = app
        self._keys = [_expected(key) for key in (args.api_key or "").split(",") if key]
        self._admin = [_expected(args.admin_api_key)] if args.admin_api_key else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        if self._admin and scope["path"] in ADMIN_PATHS:
            accepted = self._admin
        else:
            accepted = [*self._keys, *self._admin] if self._keys else []
        given = dict(scope["headers"]).get(b"authorization", b"")
        # All are compared, so that the time taken does not tell which of them was close.
        fits = [hmac.compare_digest(given, key) for key in accepted]
        if accepted and not any(fits):
            text = "the API key is missing or wrong"
            if accepted is self._admin and any(hmac.compare_digest(given, k) for k in self._keys):
                text = "this route needs the admin key"
            response = error_response(scope, text, 401)
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["api_key"] = hashlib.sha256(given).hexdigest()[:16]
        await self._app(scope, receive, send)


def _expected(key: str) -> bytes:
    return b"Bearer " + key.encode()
