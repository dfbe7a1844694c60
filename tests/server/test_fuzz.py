"""Whatever a client sends, the server answers, and never with a 5xx."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tca_runtime.server.schemas import ChatBody, CompletionBody, GenerateBody, SamplingBody
from tests.server.harness import Server

HELLO = [{"role": "user", "content": "hello"}]
ROUTES: list[tuple[str, type[msgspec.Struct], dict[str, Any]]] = [
    ("/generate", GenerateBody, {"text": "hello"}),
    ("/v1/completions", CompletionBody, {"prompt": "hello"}),
    ("/v1/chat/completions", ChatBody, {"messages": HELLO}),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63), 10**40])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["hello", "auto", "required", "(", '{"type": "string"}', "\x00", "🙂"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "role", "content", "n", "schema", "1"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"items": value}
    return value


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_field_with_any_value(server: Server, data: st.DataObject) -> None:
    path, schema, body = data.draw(st.sampled_from(ROUTES))
    names = [f.name for f in msgspec.structs.fields(schema)]
    fields = data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    if "max_tokens" not in fields and path != "/generate":
        fields["max_tokens"] = 4
    response = server.post(path, {**body, **fields})
    assert response.status_code < 500, response.text
    assert response.content


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from([f.name for f in msgspec.structs.fields(SamplingBody)]), value=VALUES)
def test_any_sampling_field_with_any_value(server: Server, name: str, value: Any) -> None:
    response = server.post("/generate", {"text": "a", "sampling_params": {name: value}})
    assert response.status_code < 500, response.text


@pytest.mark.parametrize(("path", "schema", "body"), ROUTES)
def test_null_everywhere(
    server: Server, path: str, schema: type[msgspec.Struct], body: dict[str, Any]
) -> None:
    nulls = {field.name: None for field in msgspec.structs.fields(schema)}
    response = server.post(path, {**nulls, **body})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("depth", [60, 150, 300, 450, 600, 800, 900])
@pytest.mark.parametrize("kind", ["list", "dict"])
def test_deep_nesting_anywhere(server: Server, depth: int, kind: str) -> None:
    deep = nested(depth, kind)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": deep}}}
    call = {"function": {"name": "f", "arguments": "[" * depth * 100}}
    bodies: list[dict[str, Any]] = [
        {"messages": HELLO, "tools": [tool]},
        {"messages": HELLO, "tools": [tool], "tool_choice": "required"},
        {"messages": [{"role": "user", "content": "x", "extra": deep}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [call]}]},
        {"messages": HELLO, "custom_params": {"x": deep}},
        {"messages": HELLO, "json_schema": {"x": deep}},
        {"messages": HELLO, "chat_template_kwargs": {"x": deep}},
    ]
    for body in bodies:
        assert server.post("/v1/chat/completions", body).status_code in (200, 400)
