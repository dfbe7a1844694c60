"""``/v1/chat/completions``."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.server.fake_scheduler import DEFAULT_ANSWER, logprob_of
from tests.server.harness import Server
from tests.server.test_native import events, script
from tests.tokenizer.toy_tokenizers import IM_END, IM_START

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def chat(server: Server, messages: Any = HELLO, **body: Any) -> dict[str, Any]:
    response = server.post(PATH, {"messages": messages, **body})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def chat_stream(server: Server, **body: Any) -> list[dict[str, Any]]:
    request = {"messages": HELLO, "stream": True, **body}
    return events(server.post(PATH, request, stream=True))


def last_prompt(server: Server) -> str:
    ids = np.frombuffer(server.scheduler.received[-1].input_ids, dtype="<i4").tolist()
    return str(server.tokenizer.decode(ids))


def test_template_and_shape(server: Server) -> None:
    messages = [{"role": "system", "content": "be brief"}, *HELLO]
    reply = chat(server, messages)
    assert last_prompt(server) == (
        f"{IM_START}system\nbe brief{IM_END}\n{IM_START}user\nhello{IM_END}\n{IM_START}assistant\n"
    )
    (choice,) = reply["choices"]
    assert reply["object"] == "chat.completion" and reply["id"].startswith("chatcmpl-")
    assert choice["message"] == {"role": "assistant", "content": DEFAULT_ANSWER}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_without_a_limit_the_answer_may_fill_the_context(server: Server) -> None:
    reply = chat(server)
    room = 512 - reply["usage"]["prompt_tokens"]
    assert server.scheduler.received[-1].sampling.max_new_tokens == room
    chat(server, max_tokens=9)
    assert server.scheduler.received[-1].sampling.max_new_tokens == 9
    chat(server, max_tokens=9, max_completion_tokens=4)
    assert server.scheduler.received[-1].sampling.max_new_tokens == 4


def test_content_parts_and_nulls(server: Server) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    messages = [
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "?"},
    ]
    chat(server, messages)
    assert "hello\nworld" in last_prompt(server) and f"assistant\n{IM_END}" in last_prompt(server)


def test_continue_final_message(server: Server) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "the capital"}]
    chat(server, messages, continue_final_message=True)
    assert last_prompt(server).endswith(f"{IM_START}assistant\nthe capital")


def test_logprobs_spell_the_content(server: Server) -> None:
    reply = chat(server, logprobs=True, top_logprobs=2, **script(answer="naïve 🙂"))
    content = reply["choices"][0]["logprobs"]["content"]
    spelled = b"".join(bytes(entry["bytes"]) for entry in content)
    assert spelled.decode() == reply["choices"][0]["message"]["content"] == "naïve 🙂"
    first = server.tokenizer.encode("naïve 🙂")[0]
    assert content[0]["logprob"] == pytest.approx(logprob_of(first))
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(content)


def test_n_samples(server: Server) -> None:
    reply = chat(server, n=3, seed=1)
    assert [c["message"]["content"] for c in reply["choices"]] == [DEFAULT_ANSWER] * 3
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2]
    one = chat(server)["usage"]
    assert reply["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert reply["usage"]["completion_tokens"] == 3 * one["completion_tokens"]


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}},
            {"type": "integer"},
        ),
    ],
)
def test_response_format(
    server: Server, response_format: dict[str, Any], schema: dict[str, Any] | None
) -> None:
    chat(server, response_format=response_format)
    grammar = server.scheduler.received[-1].sampling.grammar
    assert (json.loads(grammar.value) if grammar else None) == schema


def test_stream(server: Server) -> None:
    chunks = chat_stream(
        server,
        n=2,
        logprobs=True,
        stream_options={"include_usage": True},
        **script(delay=0.01),
    )
    *chunks, last = chunks
    assert last["usage"]["completion_tokens"] > 4 and last["choices"] == []
    texts, spelled = ["", ""], ["", ""]
    reasons: list[Any] = [None, None]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        index = choice["index"]
        assert chunk["object"] == "chat.completion.chunk" and reasons[index] is None
        texts[index] += choice["delta"].get("content") or ""
        for entry in (choice["logprobs"] or {"content": []})["content"]:
            spelled[index] += entry["token"]
        reasons[index] = choice["finish_reason"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert texts == spelled == [DEFAULT_ANSWER] * 2
    assert reasons == ["stop", "stop"]


def test_tools_are_offered_unless_refused(server: Server) -> None:
    chat(server, tools=TOOLS)
    assert "get_weather" in last_prompt(server)
    assert server.scheduler.received[-1].sampling.grammar is None
    reply = chat(server, tools=TOOLS, tool_choice="none", **script(answer=CALL))
    assert "get_weather" not in last_prompt(server)
    assert reply["choices"][0]["message"]["content"] == CALL


def test_tool_call(server: Server) -> None:
    reply = chat(server, tools=TOOLS, **script(answer=f"Let me see.\n{CALL}\n{CALL}"))
    (choice,) = reply["choices"]
    first, second = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see.\n"
    assert first["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert first["id"] != second["id"]


def test_half_a_character_in_a_tool_call_is_no_error(server: Server) -> None:
    answer = CALL.replace("Paris", "\\ud800")
    reply = chat(server, tools=TOOLS, **script(answer=answer))
    (call,) = reply["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "\\ud800"}'


def test_tool_call_stream(server: Server) -> None:
    answer = f"Let me see.\n{CALL}\n{CALL}"
    chunks = chat_stream(server, tools=TOOLS, **script(answer=answer, delay=0.001))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == "Let me see."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert {call["function"]["arguments"] for call in calls} == {'{"city": "Paris"}'}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "names", "most"),
    [
        ("required", {"get_weather", "get_time"}, None),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}, 1),
    ],
)
def test_forced_tool_call(server: Server, choice: Any, names: set[str], most: int | None) -> None:
    answer = '[{"name": "get_time", "parameters": {}}]'
    reply = chat(server, tools=TOOLS, tool_choice=choice, **script(answer=answer))
    (call,) = reply["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "get_time", "arguments": "{}"}
    assert reply["choices"][0]["message"]["content"] is None
    grammar = server.scheduler.received[-1].sampling.grammar
    assert grammar is not None
    schema = json.loads(grammar.value)
    assert schema["minItems"] == 1 and schema.get("maxItems") == most
    items = schema["items"]["anyOf"]
    assert {item["properties"]["name"]["enum"][0] for item in items} == names


def test_tool_conversation_is_rendered(server: Server) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    chat(server, messages, tools=TOOLS)
    assert "tool\nnoon" in last_prompt(server)
    bad = {**call, "function": {"name": "get_time", "arguments": "{"}}
    messages[1]["tool_calls"] = [bad]
    assert server.post(PATH, {"messages": messages}).status_code == 400
