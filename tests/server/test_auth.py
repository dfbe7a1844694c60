"""Keys and tenants."""

from __future__ import annotations

from typing import Any

import pytest

from tca_runtime.server.auth import ADMIN_PATHS, OPEN_PATHS
from tca_runtime.server.identity import cache_namespace
from tests.server.harness import Server, running_server
from tests.server.test_openapi import OPERATIONS

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def bearer(key: str) -> dict[str, Any]:
    return {"Authorization": f"Bearer {key}"}


def status(server: Server, method: str, path: str, key: str | None) -> int:
    send = server.get if method == "get" else lambda p, **kw: server.post(p, {}, **kw)
    return send(path, headers=bearer(key) if key else {}).status_code


@pytest.mark.parametrize(
    ("keys", "accepted", "admin"),
    [
        ({"api_key": "one,two"}, {"one", "two"}, {"one", "two"}),
        ({"api_key": "one", "admin_api_key": "root"}, {"one", "root"}, {"root"}),
        ({"admin_api_key": "root"}, {None}, {"root"}),
    ],
)
def test_who_may_call_what(
    keys: dict[str, str], accepted: set[str | None], admin: set[str | None]
) -> None:
    with running_server(**keys) as server:
        for method, path in OPERATIONS:
            path = path.replace("{model_id}", "x")
            allowed = admin if path in ADMIN_PATHS else accepted
            for key in (None, "one", "two", "root", "wrong", "one,two"):
                opens = path in OPEN_PATHS or None in allowed or key in allowed
                assert (status(server, method, path, key) != 401) == opens, (method, path, key)
        for path in ("/openapi.json", "/docs", "/healthy", "/metrics/../server_info"):
            assert (server.get(path).status_code == 401) == (None not in accepted)


def test_a_client_key_is_told_that_it_is_no_admin_key() -> None:
    with running_server(api_key="one", admin_api_key="root") as server:
        response = server.post("/flush_cache", {}, headers=bearer("one"))
        assert response.status_code == 401 and "admin key" in response.json()["message"]
        info = server.get("/server_info", headers=bearer("root")).json()
        assert not {"api_key", "admin_api_key"} & set(info)


def test_clients_are_told_apart_by_key_user_and_namespace() -> None:
    with running_server(api_key="one,two") as server:

        def client(key: str, path: str = "/generate", **fields: Any) -> str:
            body = {"text": "a"} if path == "/generate" else {"messages": HELLO}
            response = server.post(path, {**body, **fields}, headers=bearer(key))
            assert response.status_code == 200, response.text
            return server.scheduler.received[-1].client

        names = [
            client("one"),
            client("two"),
            client("one", user="u"),
            client("one", extra_key="e"),
            client("one", cache_salt="e"),
        ]
        assert len(set(names)) == len(names)
        assert client("one", CHAT, user="u", extra_key="other") == client("one", user="u")
        assert not any("one" in name for name in names)


def test_priority_and_namespace_reach_the_scheduler(server: Server) -> None:
    for path, body in [
        ("/generate", {"text": "a"}),
        ("/v1/completions", {"prompt": "a"}),
        (CHAT, {"messages": HELLO}),
    ]:
        response = server.post(path, {**body, "priority": 3, "extra_key": "e", "cache_salt": "s"})
        assert response.status_code == 200
        message = server.scheduler.received[-1]
        assert message.priority == 3
        assert message.extra_key == cache_namespace("e", "s")


def test_no_extra_key_opens_a_salted_namespace() -> None:
    spaces = [
        cache_namespace(None, None),
        cache_namespace("a", None),
        cache_namespace("ab", "c"),
        cache_namespace("a", "bc"),
        cache_namespace(None, "abc"),
        cache_namespace("2:abc", None),
    ]
    assert len(set(spaces)) == len(spaces)
    assert cache_namespace("", "") is None


def test_overload_tells_when_to_come_back(server: Server) -> None:
    params = {"custom_params": {"error": [503, "4096 requests are waiting already"]}}
    response = server.post("/generate", {"text": "a", "sampling_params": params})
    assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 1
    response = server.post("/generate", {"text": 5})
    assert response.status_code == 400 and "Retry-After" not in response.headers
