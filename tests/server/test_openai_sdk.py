"""The openai SDK against the fake scheduler."""

from __future__ import annotations

import openai
import pytest
from pydantic import BaseModel

from tests.server.fake_scheduler import DEFAULT_ANSWER
from tests.server.harness import MODEL, Server, running_server

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def scripted(**script: object) -> dict[str, object]:
    return {"custom_params": script}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2, n=2, seed=3
    )
    assert [choice.message.content for choice in reply.choices] == [DEFAULT_ANSWER] * 2
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.content
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None


def test_chat_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == DEFAULT_ANSWER
    assert final.choices[0].finish_reason == "stop"


def test_parse_into_a_model(client: openai.OpenAI, server: Server) -> None:
    class City(BaseModel):
        name: str

    reply = client.chat.completions.parse(
        model=MODEL,
        messages=HELLO,
        response_format=City,
        extra_body=scripted(answer='{"name": "Paris"}'),
    )
    assert reply.choices[0].message.parsed == City(name="Paris")
    grammar = server.scheduler.received[-1].sampling.grammar
    assert grammar is not None and '"name"' in grammar.value


def test_tool_stream_helper(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "get_time", "parameters": {}}}]
    answer = '<tool_call>{"name": "get_time", "arguments": {"zone": "CET"}}</tool_call>'
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=tools, extra_body=scripted(answer=answer)
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == '{"zone": "CET"}'


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt=["a", "b"], logprobs=1, echo=True)
    assert [choice.text for choice in reply.choices] == ["a" + DEFAULT_ANSWER, "b" + DEFAULT_ANSWER]
    chunks = client.completions.create(
        model=MODEL, prompt="a", stream=True, stream_options={"include_usage": True}
    )
    *rest, last = list(chunks)
    assert "".join(chunk.choices[0].text for chunk in rest) == DEFAULT_ANSWER
    assert last.usage is not None and last.usage.completion_tokens > 0


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    broken = scripted(error=[400, "broken schema"])
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="broken schema"):
            client.chat.completions.create(
                model=MODEL, messages=HELLO, stream=stream, extra_body=broken
            )


def test_error_in_a_stream(client: openai.OpenAI) -> None:
    extra = {"stop_regex": "(a|aa)+[bc]$"} | scripted(answer="hello " + "a" * 300, delay=0.01)
    with pytest.raises(openai.APIError, match="too long"):
        list(
            client.chat.completions.create(
                model=MODEL, messages=HELLO, stream=True, extra_body=extra
            )
        )


def test_api_key() -> None:
    with running_server(api_key="secret") as server:
        good = openai.OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0)
        bad = openai.OpenAI(base_url=server.url + "/v1", api_key="guess", max_retries=0)
        assert good.models.list().data
        with pytest.raises(openai.AuthenticationError):
            bad.models.list()
