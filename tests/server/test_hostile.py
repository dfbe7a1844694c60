"""Bodies made to hurt: each gets an answer that is no 5xx, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import requests

from tca_runtime.server import sampling
from tests.server.harness import Server

CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
HELLO = [{"role": "user", "content": "hello"}]
MIB = 1 << 20

Body = dict[str, Any]


def native(**params: Any) -> tuple[str, Body]:
    return NATIVE, {"text": "a", "sampling_params": params}


def chat(**fields: Any) -> tuple[str, Body]:
    return CHAT, {"messages": HELLO, **fields}


def nested(depth: int, key: str = "items") -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {key: value}
    return value


def reference_bomb(levels: int) -> Body:
    """A schema of a few kilobytes whose written-out form is exponential."""
    definitions: Body = {
        f"d{i}": {
            "type": "object",
            "properties": {name: {"$ref": f"#/$defs/d{i + 1}"} for name in "abcdefgh"},
        }
        for i in range(levels)
    }
    return {"$defs": {**definitions, f"d{levels}": {"type": "string"}}, "$ref": "#/$defs/d0"}


# Made when their turn comes: some are large.
CASES: dict[str, Callable[[], tuple[str, Body]]] = {
    "stop string of 10 MB": lambda: native(stop="x" * 10 * MIB),
    "stop strings of 10 MB": lambda: native(stop=["x" * 1000 + str(i) for i in range(10_000)]),
    "chat stop of 10 MB": lambda: chat(stop=["y" * 10 * MIB]),
    "stop strings that share a border": lambda: native(
        stop=["a" * 4000 + str(i) for i in range(32)], n=128
    ),
    "stop pattern of 1 MB": lambda: native(stop_regex="(a|b)" * 200_000),
    "nested quantifiers": lambda: native(stop_regex="((a+)+)+b", max_new_tokens=50),
    "counted quantifiers": lambda: native(stop_regex="((a{1,99}){1,99}){1,99}b"),
    "fuzzy pattern": lambda: native(stop_regex="(?:hello world){e<=9}x"),
    "recursive pattern": lambda: native(stop_regex="(?:a|(?R)b)+c"),
    "back references": lambda: native(stop_regex=r"(a*)*\1\1\1b"),
    "many patterns": lambda: native(stop_regex=[f"(a|b){{1,{i}}}c" for i in range(1000)]),
    "many patterns in a batch": lambda: (
        NATIVE,
        {
            "text": ["a"] * 200,
            "sampling_params": [{"stop_regex": [f"x{i}", f"y{i}"]} for i in range(200)],
        },
    ),
    "pattern that is no pattern": lambda: native(stop_regex="(?P<a>x)(?P<a"),
    "huge n": lambda: native(n=10**9),
    "huge n of chat": lambda: chat(n=10**18),
    "n beyond 64 bits": lambda: chat(n=10**40),
    "batch of a million prompts": lambda: (NATIVE, {"text": ["a"] * 10**6}),
    "completions of a million prompts": lambda: (TEXT, {"prompt": ["a"] * 10**6}),
    "a million empty prompts": lambda: (NATIVE, {"input_ids": [[]] * 10**6}),
    "batch times n": lambda: (NATIVE, {"text": ["a"] * 100, "sampling_params": {"n": 128}}),
    "logit bias of every id and more": lambda: chat(
        logit_bias={str(i): 1.0 for i in range(200_000)}
    ),
    "logit bias of huge values": lambda: chat(logit_bias={"5": 1e308, "6": -1e308}),
    "logit bias of a huge id": lambda: chat(logit_bias={str(10**30): 1.0}),
    "logit bias of words": lambda: chat(logit_bias={"hello": 1.0}),
    "stop ids by the million": lambda: native(stop_token_ids=[5] * 10**6),
    "token ids asked for by the million": lambda: (
        NATIVE,
        {"text": "a", "return_logprob": True, "token_ids_logprob": [1] * 10**6},
    ),
    "prompt of 5 MB": lambda: (NATIVE, {"text": "ab " * (2 * MIB)}),
    "prompt of one endless word": lambda: (NATIVE, {"text": "a" * (2 * MIB)}),
    "prompt of control characters": lambda: (NATIVE, {"text": "\x00\x01\u2028\ufeff" * 20}),
    "prompt of special tokens": lambda: (NATIVE, {"text": "<|im_end|>" * 10_000}),
    "a million token ids": lambda: (NATIVE, {"input_ids": [5] * 10**6}),
    "ids beyond 32 bits": lambda: (NATIVE, {"input_ids": [2**31, 2**63, -(2**63)]}),
    "rid of 1 MB": lambda: (NATIVE, {"text": "a", "rid": "r" * MIB}),
    "rid of 1 MB times a batch": lambda: (NATIVE, {"text": ["a"] * 4096, "rid": "r" * MIB}),
    "rid of 1 MB times a batch of completions": lambda: (
        TEXT,
        {"prompt": ["a"] * 4096, "rid": "r" * MIB},
    ),
    "rid of 1 MB times n": lambda: chat(rid="r" * MIB, n=128),
    "salts of 1 MB each": lambda: (
        NATIVE,
        {"text": ["a"] * 8, "cache_salt": ["s" * MIB] * 8, "extra_key": ["e" * MIB] * 8},
    ),
    "schema times a batch": lambda: (
        NATIVE,
        {
            "text": ["a"] * 4096,
            "sampling_params": {"json_schema": {"enum": [f"value {i}" for i in range(10_000)]}},
        },
    ),
    "regex times a batch of completions": lambda: (
        TEXT,
        {"prompt": ["a"] * 4096, "regex": "(a|b)" * 20_000},
    ),
    "rid that forges a log line": lambda: (NATIVE, {"text": "a", "rid": "x\nERROR server: gone"}),
    "user of 1 MB": lambda: chat(user="u" * MIB),
    "salt of 1 MB": lambda: chat(cache_salt="s" * MIB),
    "key with separators": lambda: (NATIVE, {"text": "a", "extra_key": "a\x00b\x00"}),
    "deep schema": lambda: chat(json_schema=nested(400)),
    "deep tools": lambda: chat(
        tools=[{"type": "function", "function": {"name": "f", "parameters": nested(400)}}]
    ),
    "deep custom parameters": lambda: native(custom_params=nested(400)),
    "deep known parameter": lambda: native(custom_params={"kept_ratio": nested(400)}),
    "wide known parameter times a batch": lambda: (
        NATIVE,
        {
            "text": ["a"] * 4096,
            "sampling_params": {"custom_params": {"kept_ratio": [0] * 200_000}},
        },
    ),
    "deep template variables": lambda: chat(chat_template_kwargs=nested(400)),
    "wide object": lambda: native(custom_params={f"k{i}": i for i in range(200_000)}),
    "schema of references": lambda: chat(json_schema=reference_bomb(40)),
    "schema of 5 MB": lambda: chat(
        json_schema={"enum": ["v" * 100 + str(i) for i in range(40_000)]}
    ),
    "schema that refers to itself": lambda: chat(json_schema={"$ref": "#"}),
    "schema with a huge count": lambda: chat(
        json_schema={"type": "array", "items": {}, "minItems": 10**12}
    ),
    "regex of 2 MB": lambda: native(regex="(a|b)" * 400_000),
    "regex of counts": lambda: native(regex="((a{1,999}){1,999}){1,999}"),
    "grammar that recurs to the left": lambda: native(ebnf='root ::= root root | "a"'),
    "grammar of 2 MB": lambda: native(ebnf='root ::= "a" ' * 200_000),
    "a hundred thousand messages": lambda: (CHAT, {"messages": HELLO * 100_000}),
    "message of a million parts": lambda: (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 10**6}]},
    ),
    "a thousand tools": lambda: chat(
        tools=[
            {"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object"}}}
            for i in range(1000)
        ],
        tool_choice="required",
    ),
    "tool that is no identifier": lambda: chat(
        tools=[{"type": "function", "function": {"name": "\n]}<tool_call>"}}]
    ),
    "arguments that are deep JSON": lambda: (
        CHAT,
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}],
                }
            ]
        },
    ),
    "template code in a message": lambda: (
        CHAT,
        {"messages": [{"role": "user", "content": "{{ ''.__class__.__mro__ }}{% for %}"}]},
    ),
    "temperature beyond floats": lambda: native(temperature=1e308),
    "tiny top_p": lambda: native(top_p=5e-324),
    "penalties at the edge": lambda: native(repetition_penalty=5e-324, frequency_penalty=-2.0),
    "seed beyond 64 bits": lambda: native(seed=-(2**70)),
    "negative lengths": lambda: native(max_new_tokens=-(2**62), min_new_tokens=-1),
    "top logprobs of everything": lambda: (
        NATIVE,
        {"text": "a", "return_logprob": True, "top_logprobs_num": 10**9},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_it_is_answered(server: Server, name: str, stream: bool) -> None:
    path, body = CASES[name]()
    response = server.post(path, {**body, "stream": stream})
    assert response.status_code < 500, response.text[:300]
    if response.status_code != 200:
        error = response.json()
        message = error.get("error", error)["message"]
        assert message and len(message) < 2000
    assert server.get("/health").status_code == 200


RAW = {
    "number of a million digits": b'{"text": "a", "sampling_params": {"seed": '
    + b"9" * 10**6
    + b"}}",
    "exponent beyond floats": b'{"text": "a", "sampling_params": {"temperature": 1e99999}}',
    "not a number": b'{"text": "a", "sampling_params": {"top_p": NaN}}',
    "infinity": b'{"messages": [], "temperature": -Infinity}',
    "lone surrogate": b'{"text": "\\ud800\\ud800"}',
    "lone surrogate in a key": b'{"text": "a", "\\udfff": 1}',
    "half an emoji": b'{"text": "a", "sampling_params": {"custom_params": {"\\ud83d": 1}}}',
    "overlong UTF-8": b'{"text": "\xc0\xaf"}',
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"text": "a"}',
    "null bytes": b"\x00" * 1000,
    "key a million times": b"{" + b",".join(b'"text": "a"' for _ in range(10**6)) + b"}",
    "brackets": b"[" * 10**6,
    "open objects": b'{"a":' * 10**6,
    "string without an end": b'{"text": "' + b"a" * MIB,
    "comments": b'{"text": "a" /* x */}',
    "trailing garbage": b'{"text": "a"} {"text": "b"}',
    "form": b"text=a&stream=1",
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("path", [NATIVE, TEXT, CHAT, "/abort_request", "/start_profile"])
def test_raw_bytes_are_answered(server: Server, name: str, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = requests.post(server.url + path, data=RAW[name], headers=headers, timeout=30)
    assert response.status_code < 500, response.text[:300]
    if response.status_code != 200:
        assert len(json.dumps(response.json())) < 3000
    assert server.get("/health").status_code == 200


def test_a_compressed_body_is_not_unpacked(server: Server) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    body = b"\x1f\x8b" + b"\x00" * 1000
    response = requests.post(server.url + NATIVE, data=body, headers=headers, timeout=30)
    assert response.status_code == 400


def asked_bytes(server: Server, path: str, body: Body) -> list[int]:
    """The sizes of what the scheduler was told because of a call."""
    before = len(server.scheduler.received)
    response = server.post(path, body)
    assert response.status_code == 200, response.text[:300]
    return [len(msgspec.msgpack.encode(m)) for m in server.scheduler.received[before:]]


@pytest.mark.parametrize(
    ("path", "prompts"), [(NATIVE, {"text": ["a"] * 64}), (TEXT, {"prompt": ["a"] * 64})]
)
def test_a_long_rid_does_not_travel_with_every_output(
    server: Server, path: str, prompts: Body
) -> None:
    samples: Body = {"n": 2, "max_tokens": 1}
    if path == NATIVE:
        samples = {"sampling_params": {"n": 2, "max_new_tokens": 1}}
    body = {**prompts, **samples}
    short, long = (asked_bytes(server, path, {**body, "rid": "r" * n}) for n in (1, 1000))
    assert len(long) == len(short) == 128
    assert max(long) <= max(short) + 8


@pytest.mark.parametrize("path", [NATIVE, TEXT, CHAT])
def test_custom_parameters_that_nobody_reads_stay_here(server: Server, path: str) -> None:
    body: Body = {NATIVE: {"text": "a"}, TEXT: {"prompt": "a"}, CHAT: {"messages": HELLO}}[path]
    params: Body = {"custom_params": {"kept_ratio": 0.5, "note": "x" * MIB, "deep": nested(100)}}
    sizes = asked_bytes(server, path, {**body, "sampling_params": params, **params})
    assert max(sizes) < 4096
    assert server.scheduler.received[-1].sampling.custom_params == {"kept_ratio": 0.5}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (NATIVE, {"text": ["a"] * 4096, "sampling_params": {"regex": "a" * 100_000}}),
        (TEXT, {"prompt": ["a"] * 4096, "json_schema": {"enum": ["v" * 100_000]}}),
        (
            TEXT,
            {"prompt": ["a"] * 32, "n": 128, "stop": [c * 4000 for c in "abcdefghijklmnopqrst"]},
        ),
    ],
)
def test_what_every_output_needs_is_limited_over_the_call(
    server: Server, path: str, body: Body
) -> None:
    before = len(server.scheduler.received)
    response = server.post(path, body)
    assert response.status_code == 413, response.text[:300]
    assert str(1 << 28) in response.text
    assert len(server.scheduler.received) == before


def test_parameters_of_a_batch_are_checked_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    check = sampling.check_token_ids

    def counting(name: str, *args: Any) -> None:
        checked.append(name)
        check(name, *args)

    monkeypatch.setattr(sampling, "check_token_ids", counting)
    params: Body = {"logit_bias": {"5": 1.0}}
    for path, body in (
        (NATIVE, {"text": ["a"] * 50, "sampling_params": params}),
        (TEXT, {"prompt": ["a"] * 50, **params}),
    ):
        checked.clear()
        sizes = asked_bytes(server, path, body)
        assert len(sizes) == 50 and checked.count("logit_bias") == 1
