"""Whose request it is: for fair shares, and for what it may find in the cache."""

from __future__ import annotations

import hashlib

from fastapi import Request


def client_name(http: Request, user: str | None, namespace: str | None) -> str:
    """The client whose share of the server a request takes.

    That is the API key it came with, and among requests of one key the ``user`` field, or else the
    cache namespace. Requests with none of these are one client.
    """
    key = getattr(http.state, "api_key", "")
    return f"{key}/{user or namespace or ''}"


def cache_namespace(extra_key: str | None, cache_salt: str | None) -> str | None:
    """The namespace of the prefix cache; None is the one of requests that name none.

    Nobody can enter a salted namespace by a well-chosen ``extra_key``: that would have to contain
    a digest of the salt.
    """
    if not cache_salt:
        return extra_key or None
    extra = extra_key or ""
    digest = hashlib.sha256(f"{len(extra)}:{extra}{cache_salt}".encode())
    return f"salted-{digest.hexdigest()}"
