"""What every route needs."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from fastapi import Request, Response

from tca_runtime.config import RuntimeConfig
from tca_runtime.server.metrics import Metrics
from tca_runtime.server.schemas import Body, parse, read_body
from tca_runtime.tokenizer.manager import TokenizerManager


@dataclass(frozen=True)
class ServerContext:
    """The settings, the manager and the metrics of one server."""

    config: RuntimeConfig
    manager: TokenizerManager
    metrics: Metrics

    async def read(self, request: Request, decoder: msgspec.json.Decoder[Body]) -> Body:
        """The decoded body of a request.

        Raises
        ------
        RequestError
            400 if it does not fit the schema, 413 if it is too large.
        ClientGone
            If the client disconnects before it is complete.
        """
        raw = await read_body(request, self.config.server.max_body_bytes)
        return parse(raw, decoder)


def json_response(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
