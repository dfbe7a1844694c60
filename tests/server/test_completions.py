"""``/v1/completions``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.fake_scheduler import DEFAULT_ANSWER, logprob_of
from tests.server.harness import MODEL, Server
from tests.server.test_native import events, script

PATH = "/v1/completions"


def complete(server: Server, **body: Any) -> dict[str, Any]:
    response = server.post(PATH, body)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def test_shape(server: Server) -> None:
    reply = complete(server, prompt="hello world", max_tokens=50, model="anything")
    assert reply["object"] == "text_completion" and reply["model"] == MODEL
    assert reply["id"].startswith("cmpl-")
    (choice,) = reply["choices"]
    assert choice["text"] == DEFAULT_ANSWER
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    prompt = len(server.tokenizer.encode("hello world"))
    completion = len(server.tokenizer.encode(DEFAULT_ANSWER)) + 1
    assert reply["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": prompt // 2},
    }


def test_defaults_to_sixteen_tokens(server: Server) -> None:
    complete(server, prompt="hello")
    assert server.scheduler.received[-1].sampling.max_new_tokens == 16


def test_prompts_and_samples_are_numbered_side_by_side(server: Server) -> None:
    reply = complete(server, prompt=["hello", "the fox"], n=2, echo=True, max_tokens=1)
    texts = [choice["text"] for choice in reply["choices"]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [text.startswith("hello") for text in texts] == [True, True, False, False]
    assert all(text.startswith("the fox") for text in texts[2:])
    prompts = [len(server.tokenizer.encode(p)) for p in ("hello", "the fox")]
    assert reply["usage"]["prompt_tokens"] == sum(prompts)
    assert reply["usage"]["completion_tokens"] == 4


def test_prompt_of_token_ids_is_echoed_as_text(server: Server) -> None:
    ids = server.tokenizer.encode("hello world")
    reply = complete(server, prompt=ids, echo=True, max_tokens=0)
    assert reply["choices"][0]["text"] == "hello world"
    assert reply["choices"][0]["finish_reason"] == "length"
    reply = complete(server, prompt=[ids, ids], max_tokens=1)
    assert len(reply["choices"]) == 2


def test_logprobs(server: Server) -> None:
    reply = complete(server, prompt="hello", logprobs=2, max_tokens=3)
    logprobs = reply["choices"][0]["logprobs"]
    ids = server.tokenizer.encode(DEFAULT_ANSWER)[:3]
    assert logprobs["tokens"] == [server.tokenizer.decode([i]) for i in ids]
    assert logprobs["token_logprobs"] == [pytest.approx(logprob_of(i)) for i in ids]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])


def test_logprobs_leave_the_stop_token_out(server: Server) -> None:
    reply = complete(server, prompt="hello", logprobs=0)
    choice = reply["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == DEFAULT_ANSWER
    assert choice["logprobs"]["top_logprobs"] is None


def test_echo_with_logprobs_scores_the_prompt(server: Server) -> None:
    reply = complete(server, prompt="hello world", echo=True, logprobs=1, max_tokens=0)
    logprobs = reply["choices"][0]["logprobs"]
    ids = server.tokenizer.encode("hello world")
    assert logprobs["token_logprobs"] == [None, *(pytest.approx(logprob_of(i)) for i in ids[1:])]
    assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"]) == len(ids)
    assert "".join(logprobs["tokens"]) == "hello world"


def test_stream(server: Server) -> None:
    body = {
        "prompt": ["hello", "world"],
        "stream": True,
        "echo": True,
        "logprobs": 0,
        "stream_options": {"include_usage": True},
        **script(delay=0.01, answer="the fox; the dog"),
    }
    chunks = events(server.post(PATH, body, stream=True))
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 4
    texts, tokens, reasons = ["", ""], [[], []], [[], []]  # type: ignore[var-annotated]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["tokens"]
        reasons[choice["index"]].append(choice["finish_reason"])
    assert texts == ["hellothe fox; the dog", "worldthe fox; the dog"]
    assert ["".join(t) for t in tokens] == texts
    assert all(r[-1] == "stop" and not any(r[:-1]) for r in reasons)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_extensions_reach_the_scheduler(server: Server) -> None:
    body = {
        "prompt": "a",
        "top_k": 3,
        "min_p": 0.2,
        "repetition_penalty": 1.2,
        "regex": "[a-z]+",
        "ignore_eos": True,
        "min_tokens": 1,
        "stop": ["x", "y"],
        "stop_token_ids": [4],
        "extra_key": "k",
        "seed": 5,
        "user": "somebody",
        "stream_options": None,
    }
    complete(server, **body)
    sent = server.scheduler.received[-1]
    assert sent.extra_key == "k" and sent.sampling.seed == 5
    assert sent.sampling.grammar is not None and sent.sampling.grammar.kind == "regex"
    assert sent.sampling.stop == ("x", "y") and sent.sampling.stop_token_ids == (4,)
    assert sent.sampling.top_k == 3 and sent.sampling.min_new_tokens == 1


def test_matched_stop_and_tca_are_shown(server: Server) -> None:
    tca = {"kept_ratio": 0.4}
    reply = complete(server, prompt="a", **script(tca=tca, stop="quick"))
    assert reply["choices"][0]["matched_stop"] == "quick"
    assert reply["choices"][0]["tca"] == tca
