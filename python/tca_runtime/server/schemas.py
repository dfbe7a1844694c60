"""Request bodies. Unknown fields are ignored, nulls mean the default.

They are msgspec structs: one pass from bytes to typed fields, which also refuses NaN, infinity,
lone surrogates and bottomless nesting.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect

from tca_runtime.server.errors import ClientGone
from tca_runtime.tokenizer.errors import RequestError

JsonObject = dict[str, Any]


class SamplingBody(msgspec.Struct, kw_only=True):
    """SGLang's ``sampling_params``. ``max_new_tokens: null`` asks for as much as fits."""

    max_new_tokens: int | None = 128
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: str | list[str | None] | None = None
    stop_token_ids: list[int | None] | None = None
    stop_regex: str | list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    logit_bias: dict[int, float] | None = None
    n: int | None = None
    seed: int | None = None
    sampling_seed: int | None = None
    json_schema: str | JsonObject | None = None
    regex: str | None = None
    ebnf: str | None = None
    custom_params: JsonObject | None = None
    structural_tag: Any = None
    beam_width: int | None = None
    watermark: Any = None

    UNSUPPORTED: ClassVar = ("structural_tag", "watermark")


class GenerateBody(msgspec.Struct, kw_only=True):
    """``/generate``. Lists make a batch; scalars beside them apply to each of its items."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    return_logprob: bool | list[bool | None] | None = None
    logprob_start_len: int | list[int | None] | None = None
    top_logprobs_num: int | list[int | None] | None = None
    token_ids_logprob: int | list[int | list[int] | None] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    extra_key: str | list[str | None] | None = None
    cache_salt: str | list[str | None] | None = None
    priority: int | None = None
    user: str | None = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    input_embeds: Any = None
    lora_path: Any = None
    lora_id: Any = None
    session_id: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None
    watermark: Any = None
    return_hidden_states: Any = None

    UNSUPPORTED: ClassVar = (
        "image_data",
        "video_data",
        "audio_data",
        "input_embeds",
        "lora_path",
        "lora_id",
        "session_id",
        "session_params",
        "custom_logit_processor",
        "watermark",
        "return_hidden_states",
    )


class StreamOptions(msgspec.Struct, kw_only=True):
    """``include_usage`` asks for a last chunk with token counts."""

    include_usage: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """OpenAI's wrapper of a JSON schema."""

    schema: JsonObject | bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """``type`` is text, json_object or json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class OpenAIBody(msgspec.Struct, kw_only=True):
    """What the two OpenAI routes share: OpenAI's fields, then SGLang's extensions."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: str | list[str | None] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | JsonObject | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int | None] | None = None
    stop_regex: str | list[str] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    custom_params: JsonObject | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    rid: str | None = None
    priority: int | None = None
    user: str | None = None
    lora_path: Any = None
    session_id: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None
    watermark: Any = None
    return_hidden_states: Any = None

    UNSUPPORTED: ClassVar[tuple[str, ...]] = (
        "lora_path",
        "session_id",
        "session_params",
        "custom_logit_processor",
        "watermark",
        "return_hidden_states",
    )


class CompletionBody(OpenAIBody, kw_only=True):
    """``/v1/completions``."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    UNSUPPORTED: ClassVar = (*OpenAIBody.UNSUPPORTED, "suffix")


class ChatBody(OpenAIBody, kw_only=True):
    """``/v1/chat/completions``."""

    messages: list[JsonObject]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    tools: list[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    continue_final_message: bool | None = None
    input_ids: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None

    UNSUPPORTED: ClassVar = (
        *OpenAIBody.UNSUPPORTED,
        "input_ids",
        "audio",
        "functions",
        "function_call",
        "web_search_options",
    )


class AbortBody(msgspec.Struct, kw_only=True):
    """``/abort_request``."""

    rid: str | None = None
    abort_all: bool | None = None


class ProfileBody(msgspec.Struct, kw_only=True):
    """``/start_profile``: where below --profile-dir to write, and when to stop by itself."""

    output_dir: str | None = None
    num_steps: int | None = None


Body = TypeVar("Body", bound=msgspec.Struct)


def check_supported(body: SamplingBody | GenerateBody | OpenAIBody) -> None:
    """Refuse what would change the answer if it were not ignored; empty values ask for nothing.

    Raises
    ------
    RequestError
        Naming the field.
    """
    for name in body.UNSUPPORTED:
        value = getattr(body, name)
        if any(value) if isinstance(value, list) else value:
            raise RequestError(f"{name} is not supported", param=name)


async def read_body(request: Request, limit: int) -> bytes:
    """The request's bytes.

    Raises
    ------
    RequestError
        413 beyond ``limit`` bytes, before they are all received.
    ClientGone
        If the client disconnects before its body is complete.
    """
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdigit() else 0
    parts: list[bytes] = []
    if size <= limit:
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    break
                parts.append(part)
        except ClientDisconnect:
            raise ClientGone from None
    if size > limit:
        raise RequestError(f"the request body is over the limit of {limit} bytes", status=413)
    return b"".join(parts)


def parse(raw: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Decode a body.

    Raises
    ------
    RequestError
        400, naming the field where there is one.
    """
    if not raw.strip():
        raise RequestError("the request body is empty; expected a JSON object")
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise RequestError(f"invalid request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from None
    except RecursionError:
        raise RequestError("the request body is nested too deeply") from None
