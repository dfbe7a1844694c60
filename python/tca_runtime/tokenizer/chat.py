"""Prompts from chat messages, through the model's Jinja template."""

from __future__ import annotations

import inspect
from typing import Any

import jinja2
import msgspec
from transformers import PreTrainedTokenizerFast

from tca_runtime.tokenizer.errors import RequestError


class ChatTemplate:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text, ready for the assistant's answer.

        Parameters
        ----------
        tools : OpenAI tool definitions the template may show to the model.
        template_kwargs : variables of the template (such as ``enable_thinking``).
        continue_final_message : leave the last message open instead of starting a new one.

        Raises
        ------
        RequestError
            If there is no template, a message is malformed or the template refuses it.
        """
        if self._tokenizer.chat_template is None:
            raise RequestError("this model has no chat template; start with --chat-template FILE")
        if not messages:
            raise RequestError("messages is empty", param="messages")
        variables = template_kwargs or {}
        if reserved := self._reserved & variables.keys():
            raise RequestError(
                f"chat_template_kwargs must not contain {sorted(reserved)}",
                param="chat_template_kwargs",
            )
        conversation = [_plain_message(i, m) for i, m in enumerate(messages)]
        try:
            prompt: str = self._tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                add_generation_prompt=not continue_final_message,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from None
        return prompt


def _plain_message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{where}.role must be a string", param="messages")
    plain = {key: value for key, value in message.items() if value is not None}
    plain["content"] = _plain_content(where, message.get("content"))
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_tool_call(where, call) for call in calls]
    return plain


def _plain_content(where: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}.content must be a string or a list of parts", param="messages")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RequestError(f"{where}.content may only have text parts", param="messages")
        texts.append(text)
    return "\n".join(texts)


def _plain_tool_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.tool_calls needs function.name", param="messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        # Templates print arguments as an object; OpenAI clients send them as a JSON text. Read as
        # strictly as bodies are: what is no text could not be tokenised.
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise RequestError(
                f"{where}.tool_calls has arguments that are not JSON", param="messages"
            ) from None
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}
