"""The openai SDK against a real server and model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import MODEL

pytestmark = pytest.mark.slow

CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=server_url + "/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    settings = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(**{**settings, **options})


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve(model.id) == model


def test_chat_answers_the_question(client: openai.OpenAI) -> None:
    reply = ask(client)
    assert "Paris" in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens <= 24
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_stream_equals_the_whole_reply(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    whole = ask(client)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 4


def test_second_turn_reuses_the_first(client: openai.OpenAI) -> None:
    first = ask(client)
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    question = {"role": "user", "content": "And of Italy?"}
    second = ask(client, messages=[*CAPITAL, answer, question])
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens - 1


def test_logprobs(client: openai.OpenAI) -> None:
    reply = ask(client, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert b"".join(bytes(e.bytes) for e in content).decode() == reply.choices[0].message.content
    for entry in content:
        best = max(top.logprob for top in entry.top_logprobs)
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(best, abs=1e-3) and entry.logprob <= 0


def test_seed_and_n(client: openai.OpenAI) -> None:
    def samples() -> list[str]:
        reply = ask(client, n=3, seed=7, temperature=1.0)
        return [choice.message.content for choice in reply.choices]

    first = samples()
    assert samples() == first
    assert len(set(first)) > 1


def test_stop(client: openai.OpenAI) -> None:
    reply = ask(client, stop=["Paris"])
    assert "Paris" not in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"


def test_json_schema(client: openai.OpenAI) -> None:
    class City(BaseModel):
        name: str
        population: int

    reply = client.chat.completions.parse(
        model=MODEL,
        messages=CAPITAL,
        response_format=City,
        temperature=0,
        max_tokens=120,
    )
    assert isinstance(reply.choices[0].message.parsed, City)


def test_json_object(client: openai.OpenAI) -> None:
    reply = ask(client, response_format={"type": "json_object"}, max_tokens=60)
    text = reply.choices[0].message.content
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert text.lstrip().startswith("{")


def test_forced_tool_call(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"unit": {"enum": ["celsius", "kelvin"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "temperature", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "temperature"}}
    reply = ask(client, tools=tools, tool_choice=choice, max_tokens=100)
    (call,) = reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["unit"] in ("celsius", "kelvin")


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL,
        prompt=["The capital of France is", "The capital of Italy is"],
        max_tokens=4,
        temperature=0,
        logprobs=2,
        echo=True,
    )
    texts = [choice.text for choice in reply.choices]
    assert texts[0].startswith("The capital of France is") and "Paris" in texts[0]
    assert texts[1].startswith("The capital of Italy is") and "Rome" in texts[1]
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, temperature=-1)
    with pytest.raises(openai.BadRequestError):
        ask(client, extra_body={"regex": "(unbalanced"})
    with pytest.raises(openai.BadRequestError, match="context length"):
        ask(client, messages=[{"role": "user", "content": "word " * 20_000}])
