"""Errors as clients see them, and the one place where they are counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.state import RequestState

# The status of requests that ended because somebody wanted it; nobody waits for such a reply.
ABORTED = 499

logger = logging.getLogger(__name__)

_MAX_LOGGED = 300

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ClientGone(Exception):
    """The client closed the connection before its reply was complete."""


def error_type(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def native_error(message: str, status: int) -> dict[str, Any]:
    """Body of an error of ``/generate``, and of every error inside a stream."""
    return {"error": {"message": message, "type": error_type(status), "code": status}}


def openai_error(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """Body of an error of every other route."""
    return {
        "object": "error",
        "message": message,
        "type": error_type(status),
        "param": param,
        "code": status,
    }


def stream_error(scope: Scope, message: str, status: int) -> dict[str, Any]:
    """Body of the event that a stream breaks off with."""
    _count(scope, status)
    return native_error(message, status)


def error_response(scope: Scope, message: str, status: int, param: str | None = None) -> Response:
    """The reply to a request that is refused or has failed."""
    _count(scope, status)
    if scope["path"] == "/generate":
        body = native_error(message, status)
    else:
        body = openai_error(message, status, param)
    headers = None
    if status in (429, 503):
        probe = scope["path"].startswith("/health")
        headers = {"Retry-After": "1" if probe else str(scope["app"].state.retry_after())}
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def raise_if_failed(state: RequestState) -> None:
    """Raise what ended an output with an error; an abort that was asked for is no error."""
    finish = state.finish
    if finish is not None and finish.type == "abort" and finish.status not in (0, ABORTED):
        raise RequestError(finish.message, status=finish.status)


def _count(scope: Scope, status: int) -> None:
    scope["app"].state.on_refusal(status)


def install_error_handlers(
    app: FastAPI, on_refusal: Callable[[int], None], retry_after: Callable[[], int]
) -> None:
    """Turn exceptions of routes into replies.

    ``on_refusal`` is told the status of each error, ``retry_after`` says how many seconds a client
    that came at a bad time should wait.
    """
    app.state.on_refusal = on_refusal
    app.state.retry_after = retry_after

    async def on_request_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        reason = error.message[:_MAX_LOGGED]
        fields = {"path": request.url.path, "status": error.status, "reason": reason}
        logger.info("request refused", extra={"fields": fields})
        return error_response(request.scope, error.message, error.status, error.param)

    async def on_bad_query(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return error_response(request.scope, f"{name}: {first['msg']}", 400, name)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(request.scope, message, error.status_code)

    async def on_recursion(request: Request, error: Exception) -> Response:
        # Only what a client sent can be nested so deeply.
        return error_response(request.scope, "the request is nested too deeply", 400)

    async def on_client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=ABORTED)

    async def on_crash(request: Request, error: Exception) -> Response:
        logger.error("%s %s", request.method, request.url.path, exc_info=error)
        return error_response(request.scope, "internal server error", 500)

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(RequestValidationError, on_bad_query)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RecursionError, on_recursion)
    app.add_exception_handler(ClientGone, on_client_gone)
    app.add_exception_handler(Exception, on_crash)
