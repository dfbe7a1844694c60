"""A client's mistake is a 4xx with a message that names it, and never harms the server."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import requests

from tests.server.fake_scheduler import CONTEXT_LENGTH
from tests.server.harness import Server, eventually, running_server
from tests.server.test_native import events, script

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def post_raw(server: Server, path: str, body: bytes) -> requests.Response:
    headers = {"Content-Type": "application/json"}
    return requests.post(server.url + path, data=body, headers=headers, timeout=30)


def message_of(response: requests.Response) -> str:
    body = response.json()
    error = body.get("error", body)
    assert isinstance(error["message"], str) and error["message"]
    return str(error["message"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "text or input_ids"),
        ({"text": "a", "input_ids": [1]}, "text or input_ids"),
        ({"text": ""}, "prompt is empty"),
        ({"text": []}, "empty"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [[]]}, "empty"),
        ({"text": 5}, "text"),
        ({"text": ["a", 5]}, "text"),
        ({"input_ids": [1, [2]]}, "mix"),
        ({"input_ids": ["a"]}, "input_ids"),
        ({"input_ids": [1.5]}, "input_ids"),
        ({"input_ids": [True]}, "input_ids"),
        ({"input_ids": [0, -1]}, "-1"),
        ({"input_ids": [10**6]}, "1000000"),
        ({"input_ids": [10**30]}, str(10**30)),
        ({"text": "a", "stream": "yes"}, "stream"),
        ({"text": "a", "rid": 3}, "rid"),
        ({"text": "a", "extra_key": ["x"]}, "extra_key"),
        ({"text": ["a", "b"], "rid": ["x"]}, "2 prompts"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "2 prompts"),
        ({"text": "a", "sampling_params": [{}]}, "sampling_params"),
        ({"text": "a", "priority": 2**70}, "priority"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 5}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [-1]}, "token_ids_logprob"),
    ],
)
def test_generate_fields(server: Server, body: dict[str, Any], words: str) -> None:
    for stream in (False, True):
        response = server.post("/generate", {"stream": stream, **body})
        assert response.status_code == 400, response.text
        assert words in message_of(response)
        assert set(response.json()) == {"error"}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"n": 0}, "n must be"),
        ({"n": 10**6}, "n must be"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": 10**30}, "context length"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "99999"),
        ({"stop_token_ids": [-5]}, "stop_token_ids"),
        ({"stop": ["x"] * 0 + [str(i) for i in range(40)]}, "stop"),
        ({"stop": "x" * 10**5}, "stop"),
        ({"stop_regex": "("}, "stop_regex"),
        ({"stop_regex": "a*"}, "empty text"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[1]"}, "json_schema"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "only one"),
        ({"regex": "a" * (2 << 20)}, "regex"),
        ({"custom_params": {"kept_ratio": 2**70}}, "custom_params"),
        ({"custom_params": {"kept_ratio": "x" * 2000}}, "custom_params"),
        ({"custom_params": {"kept_ratio": [0] * 1000}}, "custom_params"),
        ({"custom_params": json.loads("[" * 100 + "]" * 100)}, "custom_params"),
        ({"custom_params": {"kept_ratio": json.loads("[" * 100 + "]" * 100)}}, "custom_params"),
    ],
)
def test_sampling_fields(server: Server, params: dict[str, Any], words: str) -> None:
    response = server.post("/generate", {"text": "a", "sampling_params": params})
    assert response.status_code == 400, response.text
    assert words in message_of(response)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", CHAT, "/abort_request"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'{"text": "a", "sampling_params": {"temperature": NaN}}',
        b'{"text": "a", "temperature": Infinity}',
        b'{"text": "a", "sampling_params": {"top_p": 1e999}, "messages": [], "top_p": 1e999}',
        b'{"text": "\\ud800", "prompt": "\\ud800", "messages": "\\udfff", "rid": "\\ud800"}',
        b'{"text": "\xff", "rid": "\xff"}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 100_000,
    ],
)
def test_bodies_that_are_no_json_object(server: Server, path: str, body: bytes) -> None:
    response = post_raw(server, path, body)
    assert response.status_code == 400, response.text
    assert message_of(response)


def test_prompt_over_the_context_names_both_lengths(server: Server) -> None:
    count = CONTEXT_LENGTH + 9
    ids = [5] * count
    for path, body in [
        ("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}}),
        ("/v1/completions", {"prompt": ids}),
    ]:
        response = server.post(path, body)
        assert response.status_code == 400
        assert str(count) in message_of(response) and str(CONTEXT_LENGTH) in message_of(response)
    messages = [{"role": "user", "content": "x y " * 3000}]
    response = server.post(CHAT, {"messages": messages})
    assert response.status_code == 400 and str(CONTEXT_LENGTH) in message_of(response)


def test_prompt_and_output_over_the_context(server: Server) -> None:
    body = {"input_ids": [5] * 500, "sampling_params": {"max_new_tokens": 13}}
    response = server.post("/generate", body)
    assert response.status_code == 400
    assert all(number in message_of(response) for number in ("500", "13", str(CONTEXT_LENGTH)))
    body["sampling_params"] = {"max_new_tokens": 12}
    assert server.post("/generate", body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"content": "a"}]}, "role"),
        (CHAT, {"messages": ["a"]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text parts"),
        (CHAT, {"messages": [{"role": "nobody", "content": "a"}]}, "unknown role"),
        (CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, "schema"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tools"),
        (CHAT, {"messages": HELLO, "tools": [{}]}, "tools"),
        (CHAT, {"messages": HELLO, "max_tokens": -1}, "max_new_tokens"),
        (CHAT, {"messages": HELLO, "n": 0}, "n must be"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tokenize": 1}}, "tokenize"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "empty"),
        ("/v1/completions", {"prompt": []}, "empty"),
        ("/v1/completions", {"prompt": ["a", 1]}, "mix"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": "a", "best_of": 3}, "best_of"),
        ("/v1/completions", {"prompt": "a", "logprobs": -1}, "logprobs"),
    ],
)
def test_openai_fields(server: Server, path: str, body: dict[str, Any], words: str) -> None:
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    assert words in message_of(response)
    assert set(response.json()) == {"object", "message", "type", "param", "code"}


NAMES = ["rid", "extra_key", "cache_salt", "user"]
PROMPTS: dict[str, dict[str, Any]] = {
    "/generate": {"text": "a"},
    "/v1/completions": {"prompt": "a"},
    CHAT: {"messages": HELLO},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", PROMPTS)
def test_names_have_a_limit(server: Server, path: str, name: str) -> None:
    fits = {**PROMPTS[path], name: "é" * 1024}
    assert server.post(path, fits).status_code == 200
    response = server.post(path, {**PROMPTS[path], name: "x" * 1025})
    assert response.status_code == 400
    assert name in message_of(response) and "1025" in message_of(response)


@pytest.mark.parametrize("name", ["rid", "extra_key", "cache_salt"])
def test_names_in_a_list_have_a_limit(server: Server, name: str) -> None:
    body = {"text": ["a", "b"], name: ["x", "y" * 1025]}
    response = server.post("/generate", body)
    assert response.status_code == 400
    assert name in message_of(response) and "1025" in message_of(response)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 503])
def test_scheduler_refusal_has_its_status(server: Server, stream: bool, status: int) -> None:
    params = script(error=[status, "the regex is invalid: unbalanced"])
    for path, body in [
        ("/generate", {"text": "a", "sampling_params": params}),
        ("/v1/completions", {"prompt": "a", **params}),
        (CHAT, {"messages": HELLO, **params}),
    ]:
        response = server.post(path, {**body, "stream": stream})
        assert response.status_code == status
        assert "unbalanced" in message_of(response)


def test_one_bad_request_of_a_batch_fails_the_batch(server: Server) -> None:
    params = [script(hang=True), script(error=[400, "no such grammar"])]
    response = server.post("/generate", {"text": ["a", "b"], "sampling_params": params})
    assert response.status_code == 400
    hanging = server.scheduler.received[-2].rid
    eventually(lambda: hanging in server.scheduler.aborted)


def test_error_inside_a_stream(server: Server) -> None:
    params = script(stop_regex="(a|aa)+[bc]$", answer="hello " + "a" * 300, delay=0.01)
    body = {"text": "a", "sampling_params": params | {"max_new_tokens": 400}, "stream": True}
    last = events(server.post("/generate", body, stream=True))[-1]
    assert last["error"]["code"] == 400 and "too long" in last["error"]["message"]


def test_unknown_route_and_method(server: Server) -> None:
    response = server.get("/nothing")
    assert response.status_code == 404 and "/nothing" in message_of(response)
    assert server.get("/generate").status_code == 405
    assert server.get("/v1/models/other").status_code == 404
    response = server.post("/concate_and_append_request", {"src_rids": [], "dst_rid": ""})
    assert response.status_code == 404


def test_body_limit() -> None:
    with running_server(max_body_bytes=1000) as server:
        response = server.post("/generate", {"text": "x" * 2000})
        assert response.status_code == 413 and "1000" in message_of(response)
        chunks = (b"x" * 100 for _ in range(30))
        response = requests.post(server.url + "/generate", data=chunks, timeout=30)
        assert response.status_code == 413
        assert server.post("/generate", {"text": "hello"}).status_code == 200


def test_garbage_on_the_socket_is_survived(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"\x00\x01PRI * HTTP/2.0\r\n\r\n")
        connection.recv(1000)
    assert server.get("/health").status_code == 200
