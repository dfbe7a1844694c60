"""The one exception that carries an HTTP status from any depth to the reply."""

from __future__ import annotations


class RequestError(Exception):
    """A request that cannot be served; ``message`` is meant for the client.

    Parameters
    ----------
    status : HTTP status of the reply.
    param : name of the offending field, if there is one.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
