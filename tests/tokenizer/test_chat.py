"""Chat templates."""

from __future__ import annotations

import pytest

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
