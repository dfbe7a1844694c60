"""Replies as the OpenAPI schema describes them. Routes build plain objects of these shapes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tca_runtime.server.schemas import JsonObject

# [logprob or null at position 0, token id, text or null]
LogprobTriple = tuple[float | None, int, str | None]


class _Reply(msgspec.Struct, kw_only=True):
    pass


class ErrorDetail(_Reply):
    """What went wrong and whose fault it is."""

    message: str
    type: str
    code: int


class NativeError(_Reply):
    """Error of ``/generate``, and of every stream."""

    error: ErrorDetail


class OpenAIError(_Reply):
    """Error of every other route."""

    object: Literal["error"]
    message: str
    type: str
    param: str | None
    code: int


class GenerateMeta(_Reply):
    """Figures of an output; logprob fields only where they were asked for."""

    id: str
    finish_reason: JsonObject | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str
    num_retractions: int
    e2e_latency: float | msgspec.UnsetType = msgspec.UNSET
    tca: JsonObject | msgspec.UnsetType = msgspec.UNSET
    input_token_logprobs: list[LogprobTriple] | msgspec.UnsetType = msgspec.UNSET
    output_token_logprobs: list[LogprobTriple] | msgspec.UnsetType = msgspec.UNSET
    output_token_logprobs_length: int | msgspec.UnsetType = msgspec.UNSET
    input_top_logprobs: list[Any] | msgspec.UnsetType = msgspec.UNSET
    output_top_logprobs: list[Any] | msgspec.UnsetType = msgspec.UNSET
    input_token_ids_logprobs: list[Any] | msgspec.UnsetType = msgspec.UNSET
    output_token_ids_logprobs: list[Any] | msgspec.UnsetType = msgspec.UNSET


class GenerateReply(_Reply):
    """One output of ``/generate``; ``index`` only in streams of batches."""

    text: str
    output_ids: list[int]
    meta_info: GenerateMeta
    index: int | msgspec.UnsetType = msgspec.UNSET


class PromptTokensDetails(_Reply):
    """Tokens of the prompt that were found in the prefix cache."""

    cached_tokens: int


class Usage(_Reply):
    """Token counts of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(_Reply):
    """OpenAI's parallel lists, one entry a token; ``text_offset`` counts characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None] | None
    text_offset: list[int]


class CompletionChoice(_Reply):
    """One output of ``/v1/completions``."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    matched_stop: int | str | None | msgspec.UnsetType = msgspec.UNSET
    tca: JsonObject | msgspec.UnsetType = msgspec.UNSET


class CompletionReply(_Reply):
    """``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class FunctionCall(_Reply):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallReply(_Reply):
    """A tool that the model calls."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(_Reply):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCallReply] | msgspec.UnsetType = msgspec.UNSET


class ChatLogprobs(_Reply):
    """One object a token, with its likeliest alternatives."""

    content: list[JsonObject]


class ChatChoice(_Reply):
    """One output of ``/v1/chat/completions``."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    matched_stop: int | str | None | msgspec.UnsetType = msgspec.UNSET
    tca: JsonObject | msgspec.UnsetType = msgspec.UNSET


class ChatReply(_Reply):
    """``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(_Reply):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(_Reply):
    """``/v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class ModelInfo(_Reply):
    """``/model_info``."""

    model_path: str
    tokenizer_path: str
    served_model_name: str
    is_generation: bool
    weight_version: str
    load_format: str
    model_type: str | None
    architectures: list[str] | None


class ServerInfo(_Reply):
    """Settings, what became of them, and the scheduler's state, in one flat object."""

    model_path: str
    served_model_name: str
    version: str
    tp_size: int
    dp_size: int
    internal_states: list[JsonObject]


class RouterLoad(_Reply):
    """An entry of ``/get_load``, as SGLang's router reads it."""

    dp_rank: int
    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int


class Load(_Reply):
    """Of one rank; there is one."""

    timestamp: str
    dp_rank: int
    num_running_reqs: int
    num_waiting_reqs: int
    num_waiting_uncached_tokens: int
    num_used_tokens: int
    num_total_tokens: int
    num_active_tokens: int
    max_total_num_tokens: int
    max_running_requests: int
    token_usage: float
    gen_throughput: float
    cache_hit_rate: float
    utilization: float
    kv_cache: JsonObject
    memory: JsonObject | msgspec.UnsetType = msgspec.UNSET
    queues: JsonObject | msgspec.UnsetType = msgspec.UNSET


class Loads(_Reply):
    """``/v1/loads``."""

    timestamp: str
    version: str
    accelerator: str | None
    num_accelerators: int
    loads: list[Load]
