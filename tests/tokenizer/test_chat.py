"""Chat templates."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from tca_runtime.tokenizer.chat import ChatTemplate
from tca_runtime.tokenizer.errors import RequestError
from tests.tokenizer.toy_tokenizers import IM_END, IM_START, byte_level, sentencepiece

HELLO = [{"role": "user", "content": "hello"}]


def test_rendering_starts_the_answer() -> None:
    prompt = ChatTemplate(byte_level()).render(HELLO)
    assert prompt == f"{IM_START}user\nhello{IM_END}\n{IM_START}assistant\n"


def test_a_model_without_template_says_so() -> None:
    with pytest.raises(RequestError, match="--chat-template"):
        ChatTemplate(sentencepiece()).render(HELLO)


def test_arguments_of_calls_reach_the_template_as_objects() -> None:
    tokenizer = byte_level()
    template = ChatTemplate(tokenizer)
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    seen = []
    original = tokenizer.apply_chat_template

    def spy(conversation: list[dict[str, object]], **kwargs: object) -> object:
        seen.append(conversation)
        return original(conversation, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "apply_chat_template", spy)
        template.render([*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert seen[0][1]["content"] == ""
    assert seen[0][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def calling(arguments: str) -> list[dict[str, object]]:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    return [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]


def printing_calls() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or () %}"
        "{{ call.function.arguments.city }}{{ call.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    "arguments",
    [
        '{"city": "\\ud800"}',
        '{"city": "\\udfff\\ud800"}',
        '{"\\ud800": 1}',
        '{"city": NaN}',
        '{"city": -Infinity}',
        '{"city": 1e999}',
        '{"city": ',
        "[" * 100_000,
    ],
)
def test_arguments_that_are_no_json_are_refused(arguments: str) -> None:
    with pytest.raises(RequestError, match=r"messages\[1\].tool_calls .* not JSON"):
        ChatTemplate(printing_calls()).render(calling(arguments))


def test_arguments_may_have_any_text() -> None:
    prompt = ChatTemplate(printing_calls()).render(calling('{"city": "\\ud83d\\ude42 é"}'))
    assert "🙂 é" in prompt
    prompt.encode()
