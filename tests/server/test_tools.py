"""Reading tool calls back: the pieces in which an answer arrives do not matter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tca_runtime.server.tools import ToolCall, ToolParser, plan_tools
from tca_runtime.tokenizer.errors import RequestError

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g"}},
]
F = '{"name": "f", "arguments": {"s": "a } < </tool_call"}}'
G = '{"name": "g", "parameters": {}}'
NESTED = '{"name": "f", "parameters": {"a": {"b": [1, {"c": "}"}]}}}'

# Answer, expected content without outer blanks, expected names.
ANSWERS = [
    ("plain text", "plain text", []),
    ("  spaced  text ", "spaced  text", []),
    (f"see: <tool_call>{F}</tool_call>", "see:", ["f"]),
    (f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>", "", ["f", "g"]),
    (f"<tool_call>\n{F}", "", ["f"]),
    (f"<tool_call>{F}</tool_call> done", "done", ["f"]),
    ("<tool_call>oops</tool_call> x", "<tool_call>oops</tool_call> x", []),
    ('<tool_call>{"name": "h"}</tool_call>', '<tool_call>{"name": "h"}</tool_call>', []),
    ("<tool_call>{", "<tool_call>{", []),
    ("1 <tool 2", "1 <tool 2", []),
    (G, "", ["g"]),
    (f"\n<|python_tag|>{NESTED}; {G}", "", ["f", "g"]),
    ('{"answer": 42} is it', '{"answer": 42} is it', []),
    ('{"name": ["f"]}', '{"name": ["f"]}', []),
    ('{"unfinished": ', '{"unfinished":', []),
]


def parse(choice: Any, chunks: list[str]) -> tuple[str, list[ToolCall]]:
    parser = ToolParser(plan_tools(TOOLS, choice, True))
    parts: list[str | ToolCall] = []
    for chunk in chunks:
        parts += parser.feed(chunk)
    parts += parser.finish()
    calls = [part for part in parts if isinstance(part, ToolCall)]
    return "".join(part for part in parts if isinstance(part, str)), calls


@given(st.sampled_from(ANSWERS), st.data())
def test_free_calls_in_any_chunking(
    answer: tuple[str, str, list[str]], data: st.DataObject
) -> None:
    text, content, names = answer
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found, calls = parse("auto", chunks)
    assert found.strip() == content
    assert [call.name for call in calls] == names


def test_content_before_a_call_is_not_delayed_until_the_call() -> None:
    parser = ToolParser(plan_tools(TOOLS, "auto", True))
    assert parser.feed("Let me see.") == ["Let me see."]
    assert parser.feed(" <tool") == []
    assert parser.feed("box") == [" <toolbox"]


@given(st.integers(0, 200), st.integers(0, 200))
def test_forced_calls_in_any_chunking(a: int, b: int) -> None:
    text = f"[{NESTED},\n {G}]"
    a, b = sorted((a % len(text), b % len(text)))
    content, calls = parse("required", [text[:a], text[a:b], text[b:]])
    assert content == ""
    assert [call.name for call in calls] == ["f", "g"]
    assert json.loads(calls[0].arguments) == {"a": {"b": [1, {"c": "}"}]}}


@pytest.mark.parametrize(
    ("choice", "answer"),
    [
        ("auto", '<tool_call>{"name": "f", "arguments": {"s": "\\ud800 é"}}</tool_call>'),
        ("auto", '{"name": "f", "arguments": {"s": "\\ud800 é"}}'),
        ("auto", '{"name": "f", "arguments": "{\\"s\\": \\"\\ud800 é\\"}"}'),
        ("required", '[{"name": "f", "parameters": {"s": "\\ud800 é"}}]'),
    ],
)
def test_half_a_character_in_arguments_stays_escaped(choice: str, answer: str) -> None:
    content, (call,) = parse(choice, [answer])
    assert content == ""
    assert call.arguments == '{"s": "\\ud800 é"}'
    call.arguments.encode()
    assert json.loads(call.arguments) == {"s": "\ud800 é"}


def test_truncated_forced_call_is_content() -> None:
    assert parse("required", ['[{"name": "f", "para']) == ('[{"name": "f", "para', [])


def test_definitions_move_to_the_top_of_the_schema() -> None:
    def tool(name: str, definition: dict[str, Any]) -> dict[str, Any]:
        parameters = {"$defs": {"D": definition}, "properties": {"d": {"$ref": "#/$defs/D"}}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    same = [tool("a", {"type": "string"}), tool("b", {"type": "string"})]
    schema = plan_tools(same, "required", False).schema
    assert schema is not None and schema["$defs"] == {"D": {"type": "string"}}
    assert schema["maxItems"] == 1
    with pytest.raises(RequestError, match="differently"):
        plan_tools([same[0], tool("b", {"type": "null"})], "required", False)


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ([{"function": {}}], "auto"),
        ([{"function": {"name": "f", "parameters": [1]}}], "auto"),
        (TOOLS, "sometimes"),
        (TOOLS, {"function": {"name": "h"}}),
        (TOOLS, {}),
        ([], "required"),
    ],
)
def test_bad_tools_are_refused(tools: list[dict[str, Any]], choice: Any) -> None:
    with pytest.raises(RequestError):
        plan_tools(tools, choice, True)


def test_empty_tools_are_no_tools() -> None:
    plans = [plan_tools([], "auto", True), plan_tools(None, None, True)]
    plans.append(plan_tools(TOOLS, "none", True))
    assert all(plan.offered is None and not plan.names for plan in plans)
