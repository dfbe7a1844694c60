"""The OpenAPI description is complete, and the server keeps to it whatever it is sent."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from tca_runtime.config import RuntimeConfig
from tca_runtime.server.app import ROUTERS
from tca_runtime.server.context import ServerContext
from tca_runtime.server.metrics import Metrics
from tca_runtime.server.replies import GenerateReply
from tests.server.fake_scheduler import DEFAULT_ANSWER
from tests.server.harness import Server

CHECKED = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
]

OPERATIONS = [
    ("post", "/generate"),
    ("put", "/generate"),
    ("post", "/v1/completions"),
    ("post", "/v1/chat/completions"),
    ("get", "/flush_cache"),
    ("post", "/flush_cache"),
    ("post", "/abort_request"),
    ("get", "/start_profile"),
    ("post", "/start_profile"),
    ("get", "/stop_profile"),
    ("post", "/stop_profile"),
    ("get", "/health"),
    ("get", "/health_generate"),
    ("get", "/metrics"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model_id}"),
    ("get", "/get_model_info"),
    ("get", "/model_info"),
    ("get", "/get_server_info"),
    ("get", "/server_info"),
    ("get", "/tca/tree"),
    ("get", "/get_load"),
    ("get", "/v1/loads"),
]


@pytest.fixture(scope="package")
def description(server: Server) -> dict[str, Any]:
    response = server.get("/openapi.json")
    assert response.status_code == 200
    content: dict[str, Any] = response.json()
    return content


@pytest.fixture(scope="package")
def api(server: Server) -> Any:
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


# Requests that fit the description, and for routes with parameters some that do not.
MODES = [(method, path, GenerationMode.POSITIVE) for method, path in OPERATIONS]
MODES += [
    (method, path, GenerationMode.NEGATIVE)
    for method, path in OPERATIONS
    if (method in ("post", "put") and path not in ("/flush_cache", "/stop_profile"))
    or path in ("/v1/loads", "/tca/tree")
]


@pytest.mark.parametrize(("method", "path", "mode"), MODES)
def test_every_route_keeps_to_its_description(
    api: Any, method: str, path: str, mode: GenerationMode
) -> None:
    operation = api[path][method]
    checks = [CHECKS.get_one(name) for name in CHECKED]

    @settings(
        max_examples=40,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.call_and_validate(checks=checks, timeout=30)

    run()


def test_every_route_is_described(server: Server, description: dict[str, Any]) -> None:
    context = ServerContext(RuntimeConfig(), server.manager, Metrics(server.manager))
    routes = [r for router in ROUTERS for r in router(context).routes if isinstance(r, APIRoute)]
    declared = {(m.lower(), r.path.replace(":path", "")) for r in routes for m in r.methods}
    described = {(m, path) for path, methods in description["paths"].items() for m in methods}
    assert declared == described == set(OPERATIONS)
    operations = [op for path in description["paths"].values() for op in path.values()]
    assert all(op["summary"] and set(op["responses"]) == {"200", "4XX", "5XX"} for op in operations)
    assert len({op["operationId"] for op in operations}) == len(operations)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/generate", "sampling_params"),
        ("/v1/completions", "prompt"),
        ("/v1/chat/completions", "messages"),
        ("/abort_request", "rid"),
        ("/start_profile", "output_dir"),
    ],
)
def test_bodies_are_described_field_by_field(
    description: dict[str, Any], path: str, field: str
) -> None:
    body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rpartition("/")[2]
    assert field in description["components"]["schemas"][name]["properties"]


def test_references_resolve(description: dict[str, Any]) -> None:
    known = set(description["components"]["schemas"])

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            here = {node["$ref"].rpartition("/")[2]} if "$ref" in node else set()
            return here.union(*map(references, node.values()), set())
        return set().union(*map(references, node)) if isinstance(node, list) else set()

    assert references(description) <= known
    assert GenerateReply.__name__ in known


def test_described_body_works(server: Server) -> None:
    assert server.generate(text="hello")["text"] == DEFAULT_ANSWER
