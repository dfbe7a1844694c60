"""Each row of the compatibility table, against a server; and that no field is missing from it."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types import chat, completion_create_params

from tca_runtime.server.schemas import ChatBody, CompletionBody, GenerateBody, SamplingBody
from tests.server.compatibility import (
    BASES,
    CHAT,
    IGNORED,
    NATIVE,
    REFUSED,
    ROWS,
    SAMPLING,
    SUPPORTED,
    TEXT,
    Row,
    page,
)
from tests.server.harness import Server

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
BODIES = {NATIVE: GenerateBody, SAMPLING: SamplingBody, TEXT: CompletionBody, CHAT: ChatBody}
# What SGLang computes for itself.
INTERNAL = {
    "stop_strs",
    "stop_regex_strs",
    "stop_str_max_len",
    "stop_regex_max_len",
    "is_normalized",
    "ebnf_full_assistant",
}
# Ids, times and latencies.
VARYING = re.compile(r"[0-9a-f]{32}|\"(created|e2e_latency)\": ?[\d.e-]+")


def send(server: Server, row: Row, with_field: bool) -> Any:
    body = {**BASES[row.route], **row.beside}
    if with_field:
        body.pop(row.replaces or "", None)
    fields = {row.name: row.value} if with_field else {}
    if row.route == SAMPLING:
        body["sampling_params"] = fields
    else:
        body |= fields
    path = NATIVE if row.route == SAMPLING else row.route
    return server.post(path, body)


def outcome(server: Server, row: Row, with_field: bool) -> tuple[str, list[Any]]:
    """The reply, and what the scheduler was asked, without what varies by itself."""
    before = len(server.scheduler.received)
    response = send(server, row, with_field)
    assert response.status_code == 200, response.text
    asked = [msgspec.to_builtins(m) for m in server.scheduler.received[before:]]
    for message in asked:
        del message["rid"]
    return VARYING.sub("*", response.text), asked


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.route}:{row.name}")
def test_row(server: Server, row: Row) -> None:
    if row.status == REFUSED:
        response = send(server, row, True)
        assert response.status_code == 400
        error = response.json()
        assert row.name.split("_")[0] in error.get("error", error)["message"]
        empty = Row(row.route, row.name, row.status, None, beside=row.beside)
        assert send(server, empty, True).status_code == 200
        return
    same = outcome(server, row, True) == outcome(server, row, False)
    assert same == (row.status == IGNORED)


def names(route: str) -> set[str]:
    return {row.name for row in ROWS if row.route == route}


def test_rows_are_unique_and_statuses_known() -> None:
    assert len({(row.route, row.name) for row in ROWS}) == len(ROWS)
    assert {row.status for row in ROWS} == {SUPPORTED, IGNORED, REFUSED}


@pytest.mark.parametrize("route", BODIES)
def test_every_field_of_our_bodies_has_a_row(route: str) -> None:
    fields = {f.name for f in msgspec.structs.fields(BODIES[route])}
    assert fields <= names(route)
    used = {row.name for row in ROWS if row.route == route and row.status != IGNORED}
    assert used <= fields


def test_every_field_of_openai_has_a_row() -> None:
    base = chat.completion_create_params.CompletionCreateParamsBase
    assert set(base.__annotations__) | {"stream"} <= names(CHAT)
    text = completion_create_params.CompletionCreateParamsBase
    assert set(text.__annotations__) | {"stream"} <= names(TEXT)


@pytest.mark.parametrize(
    ("module", "name", "route"),
    [
        ("srt/managers/io_struct.py", "GenerateReqInput", NATIVE),
        ("srt/sampling/sampling_params.py", "SamplingParams", SAMPLING),
        ("srt/entrypoints/openai/protocol.py", "CompletionRequest", TEXT),
        ("srt/entrypoints/openai/protocol.py", "ChatCompletionRequest", CHAT),
    ],
)
def test_every_field_of_sglang_has_a_row(module: str, name: str, route: str) -> None:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        pytest.skip("SGLang is not installed")
    tree = ast.parse((Path(spec.origin).parent / module).read_text())
    [found] = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name]
    fields = {
        item.target.id
        for item in found.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    public = {field for field in fields if not field.startswith("_")} - INTERNAL
    assert public and public <= names(route)


def test_the_page_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == page()
