"""The OpenAPI description. Bodies are parsed by msgspec, so FastAPI must be told of them."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi

from tca_runtime.server import replies, schemas
from tca_runtime.server.replies import NativeError, OpenAIError

_BODIES = (
    schemas.GenerateBody,
    schemas.CompletionBody,
    schemas.ChatBody,
    schemas.AbortBody,
    schemas.ProfileBody,
)
_REPLIES = (
    replies.NativeError,
    replies.OpenAIError,
    replies.GenerateReply,
    replies.CompletionReply,
    replies.ChatReply,
    replies.ModelCard,
    replies.ModelList,
    replies.ModelInfo,
    replies.ServerInfo,
    replies.RouterLoad,
    replies.Loads,
)
_REF = "#/components/schemas/{name}"

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"


def describe(
    summary: str,
    *,
    body: type[msgspec.Struct] | None = None,
    body_required: bool = True,
    reply: Any = None,
    text: bool = False,
    streams: bool = False,
    error: type[msgspec.Struct] = OpenAIError,
) -> dict[str, Any]:
    """Keyword arguments of a route's decorator.

    Parameters
    ----------
    reply : JSON schema or struct of a successful reply; None for none
    text : whether a successful reply is plain text (as well)
    streams : whether it may be a stream of events
    """
    content: dict[str, Any] = {}
    if reply is not None:
        content[JSON] = {"schema": _schema(reply)}
    if text:
        content[TEXT] = {"schema": {"type": "string"}}
    if streams:
        # OpenAPI 3.1 cannot describe single events, and readers take a schema for that of each.
        content[EVENTS] = {}
    failure = {"content": {JSON: {"schema": _schema(error)}}}
    described: dict[str, Any] = {
        "summary": summary,
        "response_class": Response,
        "responses": {
            200: {"description": "Done", **({"content": content} if content else {})},
            "4XX": {"description": "The client's mistake", **failure},
            "5XX": {"description": "The server cannot do it now", **failure},
        },
    }
    if body is not None:
        request = {"required": body_required, "content": {JSON: {"schema": _schema(body)}}}
        described["openapi_extra"] = {"requestBody": request}
    return described


def list_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {"type": "array", "items": _schema(struct)}


def install_openapi(app: FastAPI) -> None:
    """Have ``/openapi.json`` carry the schemas that ``describe`` refers to."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, components = msgspec.json.schema_components([*_BODIES, *_REPLIES], ref_template=_REF)
            schema["components"] = {
                "schemas": components,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            }
            # A server without keys asks for none.
            schema["security"] = [{"key": []}, {}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _schema(of: Any) -> dict[str, Any]:
    if isinstance(of, dict):
        return of
    return {"$ref": _REF.format(name=of.__name__)}


GENERATE_REPLY = {"anyOf": [_schema(replies.GenerateReply), list_of(replies.GenerateReply)]}
GENERATE = describe(
    "Continue prompts",
    body=schemas.GenerateBody,
    reply=GENERATE_REPLY,
    streams=True,
    error=NativeError,
)
