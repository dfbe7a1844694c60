"""Every field that clients of ``/generate`` and the OpenAI routes may send, and what becomes of it.

This table is the one source: tests check each row against a server, and
``python -m tests.server.compatibility`` prints ``docs/compatibility.md`` from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NATIVE, SAMPLING = "/generate", "/generate, sampling_params"
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"

SUPPORTED, IGNORED, REFUSED = "supported", "ignored", "refused"

HELLO = [{"role": "user", "content": "hello"}]
BASES: dict[str, dict[str, Any]] = {
    NATIVE: {"text": "hello"},
    SAMPLING: {"text": "hello"},
    TEXT: {"prompt": "hello"},
    CHAT: {"messages": HELLO},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Row:
    """One field.

    Attributes
    ----------
    value : what the test sends; a supported field must change the request or the reply with it
    beside : what is sent with and without it
    replaces : a field of the base body that it takes the place of
    """

    route: str
    name: str
    status: str
    value: Any
    note: str = ""
    beside: dict[str, Any] = field(default_factory=dict)
    replaces: str | None = None


def _rows(route: str, status: str, note: str = "", /, **values: Any) -> list[Row]:
    return [Row(route, name, status, value, note) for name, value in values.items()]


_TENANTS = "namespace of the prefix cache, at most 1024 characters; see operations.md"
_ONE_MODEL = "one text model on one engine"
_OTHER = "changes nothing that this server does"

_NATIVE_ROWS = [
    Row(NATIVE, "text", SUPPORTED, ["a", "b"], "one text or a list", replaces="text"),
    Row(NATIVE, "input_ids", SUPPORTED, [5, 6], "one prompt or a list", replaces="text"),
    Row(NATIVE, "sampling_params", SUPPORTED, {"max_new_tokens": 2}, "one, or one per prompt"),
    Row(NATIVE, "rid", SUPPORTED, "mine", "at most 1024 characters; may be used again"),
    *_rows(NATIVE, SUPPORTED, return_logprob=True),
    Row(
        NATIVE,
        "logprob_start_len",
        SUPPORTED,
        0,
        "only position 0 has no logprob; default the prompt's end, 0 if nothing is generated",
        {"return_logprob": True},
    ),
    Row(NATIVE, "top_logprobs_num", SUPPORTED, 2, "at most 1024", {"return_logprob": True}),
    Row(NATIVE, "token_ids_logprob", SUPPORTED, [5], "at most 1024", {"return_logprob": True}),
    Row(NATIVE, "return_text_in_logprobs", SUPPORTED, True, "", {"return_logprob": True}),
    *_rows(NATIVE, SUPPORTED, stream=True),
    *_rows(NATIVE, SUPPORTED, _TENANTS, extra_key="e", cache_salt="s"),
    *_rows(NATIVE, SUPPORTED, "higher ones are admitted first", priority=3),
    *_rows(
        NATIVE,
        SUPPORTED,
        "shares the server fairly, at most 1024 characters; not SGLang's",
        user="u",
    ),
    *_rows(
        NATIVE,
        REFUSED,
        _ONE_MODEL,
        image_data="x",
        video_data="x",
        audio_data="x",
        input_embeds=[[0.5]],
        lora_path="x",
        lora_id="x",
        session_id="x",
        session_params={"id": "x"},
        custom_logit_processor="x",
        watermark={"key": 1},
        return_hidden_states=True,
    ),
    *_rows(
        NATIVE,
        IGNORED,
        _OTHER,
        mm_hashes=["x"],
        mm_content_hashes=["x"],
        use_audio_in_video=True,
        video_config={},
        return_sampling_mask=True,
        sampling_logprobs_mode="x",
        return_flat_raw_top_logprobs=True,
        return_flat_raw_output_top_logprobs=True,
        return_flat_raw_top_logprobs_b64=True,
        log_metrics=True,
        return_routed_experts=True,
        routed_experts_start_len=1,
        return_indexer_topk=True,
        modalities=["image"],
        positional_embed_overrides={},
        bootstrap_host="x",
        bootstrap_port=1,
        bootstrap_room=1,
        bootstrap_pair_key="x",
        decode_tp_size=1,
        routed_dp_rank=0,
        data_parallel_rank=0,
        disagg_prefill_dp_rank=0,
        routing_key="x",
        conversation_id="x",
        http_worker_ipc="x",
        background=True,
        require_reasoning=True,
        max_thinking_tokens=5,
        no_logs=True,
        custom_labels={},
        return_bytes=True,
        return_entropy=True,
        return_prompt_token_ids=True,
        external_trace_header={},
        received_time=1.0,
        need_wait_for_mm_inputs=True,
        num_items_assigned={},
        encoder_urls=["x"],
        max_dynamic_patch=1,
        min_dynamic_patch=1,
        image_max_dynamic_patch=1,
        video_max_dynamic_patch=1,
        images_config={},
        mm_processor_kwargs={},
        multi_item_delimiter_indices=[1],
        token_indices_to_pool=[1],
        kv_hints=[],
    ),
]

# Of SGLang's sampling parameters and the OpenAI routes alike.
_SHARED: dict[str, tuple[Any, str]] = {
    "temperature": (0.5, "0 is greedy"),
    "top_p": (0.5, ""),
    "top_k": (5, "-1 is off"),
    "min_p": (0.5, ""),
    "frequency_penalty": (0.5, ""),
    "presence_penalty": (0.5, ""),
    "repetition_penalty": (1.5, "at most 2"),
    "n": (2, "at most 128"),
    "stop": ("wor", "at most 32 strings of 4096 characters"),
    "stop_token_ids": ([5], "at most 1024"),
    "stop_regex": ("w.r", "at most 32 patterns of 256 characters; limited in time"),
    "regex": ("a+", "xgrammar's dialect"),
    "ebnf": ('root ::= "a"', ""),
    "json_schema": ('{"type": "object"}', "text or object; compiled in the background, in 20 s"),
    "ignore_eos": (True, ""),
    "skip_special_tokens": (False, ""),
    "no_stop_trim": (True, "keeps what stopped the output"),
    "logit_bias": ({"5": 1.0}, ""),
    "custom_params": (
        {"kept_ratio": 0.5},
        "settings of selection: tca, kept_ratio, max_dropped_mass, min_confidence, probes; "
        "others are ignored",
    ),
}
_SAMPLING_ROWS = [
    *(Row(SAMPLING, name, SUPPORTED, v, note) for name, (v, note) in _SHARED.items()),
    *_rows(SAMPLING, SUPPORTED, "null is as much as fits", max_new_tokens=2),
    *_rows(SAMPLING, SUPPORTED, min_new_tokens=2),
    *_rows(SAMPLING, SUPPORTED, "the text is a function of it", sampling_seed=1, seed=1),
    *_rows(SAMPLING, REFUSED, structural_tag="x", watermark={"key": 1}, beam_width=2),
    *_rows(SAMPLING, IGNORED, "always so", spaces_between_special_tokens=False),
    *_rows(SAMPLING, IGNORED, "tokens within 20 ms share an event", stream_interval=4),
]

_OPENAI_SHARED = {
    **_SHARED,
    "seed": (1, "the text is a function of it"),
    "min_tokens": (2, ""),
    "response_format": ({"type": "json_object"}, "text, json_object or json_schema"),
    "rid": ("mine", "at most 1024 characters; may be used again"),
    "extra_key": ("e", _TENANTS),
    "cache_salt": ("s", _TENANTS),
    "priority": (3, "higher ones are admitted first"),
    "user": ("u", "shares the server fairly, at most 1024 characters"),
    "stream": (True, ""),
}
_OPENAI_REFUSED = {
    "lora_path": "x",
    "session_id": "x",
    "session_params": {"id": "x"},
    "custom_logit_processor": "x",
    "watermark": {"key": 1},
    "return_hidden_states": True,
}
_OPENAI_IGNORED = {
    "return_routed_experts": True,
    "routed_experts_start_len": 1,
    "return_cached_tokens_details": True,
    "return_spec_tokens_details": True,
    "return_token_ids": True,
    "images_config": {},
    "mm_processor_kwargs": {},
    "data_parallel_rank": 0,
}


def _openai_rows(route: str) -> list[Row]:
    usage = {"include_usage": True}
    return [
        *(Row(route, name, SUPPORTED, v, note) for name, (v, note) in _OPENAI_SHARED.items()),
        Row(route, "stream_options", SUPPORTED, usage, "include_usage", {"stream": True}),
        *_rows(route, REFUSED, _ONE_MODEL, **_OPENAI_REFUSED),
        *_rows(route, IGNORED, "there is one model", model="other"),
        *_rows(route, IGNORED, _OTHER, **_OPENAI_IGNORED),
    ]


_TEXT_ROWS = [
    Row(TEXT, "prompt", SUPPORTED, ["a", "b"], "text, token ids, or lists", replaces="prompt"),
    *_rows(TEXT, SUPPORTED, "default 16", max_tokens=2),
    *_rows(TEXT, SUPPORTED, "at most 20", logprobs=2),
    *_rows(TEXT, SUPPORTED, echo=True),
    *_openai_rows(TEXT),
    *_rows(TEXT, REFUSED, suffix="x"),
    *_rows(TEXT, REFUSED, "unless it equals n", best_of=3),
    *_rows(TEXT, IGNORED, _OTHER, custom_labels={}),
]

_CHAT_ROWS = [
    Row(
        CHAT,
        "messages",
        SUPPORTED,
        [{"role": "user", "content": "bye"}],
        "text parts only",
        replaces="messages",
    ),
    *_rows(CHAT, SUPPORTED, "default as much as fits", max_tokens=2, max_completion_tokens=2),
    *_rows(CHAT, SUPPORTED, logprobs=True),
    Row(CHAT, "top_logprobs", SUPPORTED, 2, "at most 20", {"logprobs": True}),
    *_rows(CHAT, SUPPORTED, "shown by the chat template", tools=[TOOL]),
    Row(
        CHAT,
        "tool_choice",
        SUPPORTED,
        "required",
        "a forced call is constrained",
        {"tools": [TOOL]},
    ),
    Row(
        CHAT,
        "parallel_tool_calls",
        SUPPORTED,
        False,
        "of forced calls",
        {"tools": [TOOL], "tool_choice": "required"},
    ),
    *_rows(CHAT, SUPPORTED, "variables of the template", chat_template_kwargs={"mood": "sad"}),
    Row(
        CHAT,
        "continue_final_message",
        SUPPORTED,
        True,
        "",
        {"messages": [*HELLO, {"role": "assistant", "content": "hel"}]},
    ),
    *_openai_rows(CHAT),
    *_rows(
        CHAT,
        REFUSED,
        _ONE_MODEL,
        input_ids=[5],
        audio={"voice": "x"},
        functions=[{"name": "f"}],
        function_call="auto",
        web_search_options={"user_location": {}},
    ),
    *_rows(
        CHAT,
        IGNORED,
        _OTHER,
        metadata={"a": "b"},
        modalities=["text"],
        moderation={},
        prediction={"type": "content", "content": "x"},
        prompt_cache_key="x",
        prompt_cache_options={},
        prompt_cache_retention="24h",
        reasoning_effort="low",
        safety_identifier="x",
        service_tier="auto",
        store=True,
        verbosity="low",
        return_prompt_token_ids=True,
        return_meta_info=True,
        return_input_ids_in_sglext=True,
        return_output_ids_in_sglext=True,
        return_sampling_mask=True,
        sampling_logprobs_mode="x",
        return_flat_raw_output_top_logprobs=True,
        return_flat_raw_top_logprobs_b64=True,
        thinking=True,
        task="x",
        separate_reasoning=True,
        stream_reasoning=True,
        max_dynamic_patch=1,
        min_dynamic_patch=1,
        use_audio_in_video=True,
        video_config={},
    ),
]

ROWS: list[Row] = [*_NATIVE_ROWS, *_SAMPLING_ROWS, *_TEXT_ROWS, *_CHAT_ROWS]

_HEAD = """\
# Compatibility

What becomes of every field that clients of SGLang 0.5.23 and of OpenAI's routes may send. Each row
is checked by `tests/server/test_compatibility.py`:

- **supported**: sending it changes the request or the reply, as documented by SGLang or OpenAI;
- **ignored**: the reply is the same with and without it, and so is what the scheduler is asked;
- **refused**: the reply is a 400 that names the field; empty values are accepted.

Unknown fields are ignored: routers add fields of their own. Values of a wrong type are refused.

This page is printed by `python -m tests.server.compatibility`; the table is in that file.
"""


def page() -> str:
    """The markdown page."""
    parts = [_HEAD]
    for route in BASES:
        parts.append(f"\n## `{route}`\n\n| field | | remarks |\n|---|---|---|\n")
        rows = [row for row in ROWS if row.route == route]
        rows.sort(key=lambda row: [SUPPORTED, REFUSED, IGNORED].index(row.status))
        parts += [f"| `{row.name}` | {row.status} | {row.note} |\n" for row in rows]
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
