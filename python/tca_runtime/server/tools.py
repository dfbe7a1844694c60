"""Tool calls: what the client offers, what the output must look like, and how it is read back.

A forced call (``tool_choice`` "required" or a name) is constrained to a JSON array of
``{"name": ..., "parameters": {...}}``. A free one ("auto") is recognised in the two spellings that
chat templates teach: Qwen's and Hermes' ``<tool_call>{...}</tool_call>``, and Llama's bare JSON
object at the start of the answer.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

from tca_runtime.server.schemas import JsonObject
from tca_runtime.tokenizer.errors import RequestError

_OPEN, _CLOSE, _PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
_decoder = json.JSONDecoder()
# Models may write "\ud800", which is JSON but no text: such a reply could not be encoded.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class ToolCall:
    """One call; ``arguments`` is JSON text, as OpenAI clients expect."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolPlan:
    """How one request uses tools.

    Attributes
    ----------
    offered : definitions the chat template shows, None if there are none.
    names : functions that may be called; empty if no call is looked for.
    schema : JSON schema that the output must follow, for a forced call.
    """

    offered: list[JsonObject] | None = None
    names: frozenset[str] = frozenset()
    schema: JsonObject | None = None


def plan_tools(
    tools: list[JsonObject] | None, choice: str | JsonObject | None, parallel: bool
) -> ToolPlan:
    """Check the tools of a request and decide what they ask for.

    Raises
    ------
    RequestError
        If a definition is malformed or ``choice`` names something else.
    """
    functions = {f["name"]: f for f in map(_function, tools or [])}
    if choice is None:
        choice = "auto" if functions else "none"
    if choice == "none" or (choice == "auto" and not functions):
        return ToolPlan()
    if not functions:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    if choice == "auto":
        return ToolPlan(tools, frozenset(functions))
    if choice != "required":
        name = _chosen_name(choice)
        if name not in functions:
            raise RequestError(f"tool_choice names {name!r}, which is no tool", param="tool_choice")
        functions = {name: functions[name]}
        parallel = False
    return ToolPlan(tools, frozenset(functions), _forced_schema(list(functions.values()), parallel))


def _function(tool: JsonObject) -> JsonObject:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError("each of tools needs function.name", param="tools")
    if not isinstance(function.get("parameters") or {}, dict):
        raise RequestError("function.parameters must be a JSON schema object", param="tools")
    return function


def _chosen_name(choice: str | JsonObject) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError(
            'tool_choice must be "none", "auto", "required" or {"function": {"name": ...}}',
            param="tool_choice",
        )
    return name


def _forced_schema(functions: list[JsonObject], parallel: bool) -> JsonObject:
    definitions: dict[str, Any] = {}
    calls = []
    for function in functions:
        parameters = dict(function.get("parameters") or {"type": "object"})
        # "#/$defs/..." is relative to the whole schema, so definitions move to its top.
        for key, value in parameters.pop("$defs", {}).items():
            if definitions.setdefault(key, value) != value:
                raise RequestError(f"two tools define $defs/{key} differently", param="tools")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [function["name"]]},
                    "parameters": parameters,
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: JsonObject = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


class ToolParser:
    """Splits an answer that arrives in pieces into content and calls.

    A call is reported once, when it is complete. Text that turns out not to be a call is content.
    """

    def __init__(self, plan: ToolPlan) -> None:
        self._names = plan.names
        self._pending = ""
        self._read = self._read_array if plan.schema is not None else self._read_start

    def feed(self, text: str) -> list[str | ToolCall]:
        self._pending += text
        found: list[str | ToolCall] = []
        while True:
            before = self._pending, self._read
            found += self._read()
            if before == (self._pending, self._read):
                return found

    def finish(self) -> list[str | ToolCall]:
        """The answer has ended: an unclosed call may still be complete JSON."""
        rest, self._pending = self._pending, ""
        call = self._call_in(rest.removeprefix(_OPEN).strip())
        if call is not None:
            return [call]
        is_array_end = self._read == self._read_array and rest.strip() in ("", "]")
        return [] if is_array_end or not rest else [rest]

    def _read_array(self) -> list[str | ToolCall]:
        start = self._pending.lstrip().removeprefix("[").lstrip(", \r\n\t")
        return self._take_object(start)

    def _read_start(self) -> list[str | ToolCall]:
        text = self._pending.lstrip()
        if not text or _PYTHON_TAG.startswith(text):
            return []
        if text.removeprefix(_PYTHON_TAG).lstrip().startswith("{"):
            self._read = self._read_objects
        else:
            self._read = self._read_content
        return []

    def _read_objects(self) -> list[str | ToolCall]:
        start = self._pending.lstrip("; \r\n\t").removeprefix(_PYTHON_TAG).lstrip()
        if start and not start.startswith("{"):
            self._read = self._read_content
            return []
        return self._take_object(start)

    def _read_content(self) -> list[str | ToolCall]:
        before, tag, after = self._pending.partition(_OPEN)
        if tag:
            self._pending = tag + after
            self._read = self._read_tagged
            return [before] if before.strip() else []
        # Blanks stay back as well: before a call they are layout, not content.
        end = len(before) - _partial_tag(before)
        end = len(before[:end].rstrip())
        self._pending = before[end:]
        return [before[:end]] if end else []

    def _read_tagged(self) -> list[str | ToolCall]:
        tagged, close, after = self._pending.partition(_CLOSE)
        if not close:
            return []
        self._pending = after
        self._read = self._read_content
        return [self._call_in(tagged.removeprefix(_OPEN)) or tagged + close]

    def _take_object(self, start: str) -> list[str | ToolCall]:
        if "}" not in start:
            return []
        try:
            value, end = _decoder.raw_decode(start)
            call = self._call_from(value)
        except (ValueError, RecursionError):
            return []
        if call is None:
            self._read = self._read_content
            return []
        self._pending = start[end:]
        return [call]

    def _call_in(self, text: str) -> ToolCall | None:
        try:
            return self._call_from(json.loads(text))
        except (ValueError, RecursionError):
            return None

    def _call_from(self, value: Any) -> ToolCall | None:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        arguments = _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", arguments)
        return ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, arguments)


def _partial_tag(text: str) -> int:
    for length in range(min(len(_OPEN) - 1, len(text)), 0, -1):
        if text.endswith(_OPEN[:length]):
            return length
    return 0
