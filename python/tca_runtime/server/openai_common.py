"""What ``/v1/completions`` and ``/v1/chat/completions`` share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tca_runtime.server.sampling import SamplingTemplate, check_int64
from tca_runtime.server.schemas import (
    JsonObject,
    OpenAIBody,
    ResponseFormat,
    SamplingBody,
    check_supported,
)
from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.manager import Limits
from tca_runtime.tokenizer.state import RequestState

MAX_TOP_LOGPROBS = 20


def openai_sampling(
    body: OpenAIBody,
    max_tokens: int | None,
    limits: Limits,
    json_schema: str | JsonObject | None = None,
) -> SamplingTemplate:
    """Sampling parameters of an OpenAI body.

    Parameters
    ----------
    max_tokens : None for as much as fits.
    json_schema : a constraint that follows from the tools.
    """
    check_supported(body)
    check_int64("priority", body.priority or 0)
    wanted = [s for s in (json_schema, body.json_schema, _schema_of(body.response_format)) if s]
    if len(wanted) > 1:
        raise RequestError("response_format, json_schema and a forced tool call exclude each other")
    fields = SamplingBody(
        max_new_tokens=max_tokens,
        min_new_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        stop_regex=body.stop_regex,
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
        no_stop_trim=body.no_stop_trim,
        logit_bias=body.logit_bias,
        n=body.n,
        seed=body.seed,
        json_schema=wanted[0] if wanted else None,
        regex=body.regex,
        ebnf=body.ebnf,
        custom_params=body.custom_params,
    )
    return SamplingTemplate(fields, limits)


def _schema_of(response_format: ResponseFormat | None) -> str | JsonObject | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return {"type": "object"}
    if response_format.type != "json_schema":
        raise RequestError(
            f"response_format.type must be text, json_object or json_schema, "
            f"got {response_format.type!r}",
            param="response_format",
        )
    schema = response_format.json_schema.schema if response_format.json_schema else None
    if not isinstance(schema, dict):
        raise RequestError(
            "response_format.json_schema.schema must be an object", param="response_format"
        )
    return schema or "{}"


def check_top_logprobs(name: str, count: int) -> None:
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        raise RequestError(f"{name} must be in [0, {MAX_TOP_LOGPROBS}], got {count}", param=name)


def envelope(kind: str, reply_id: str, model: str) -> dict[str, Any]:
    """The fields that every reply and chunk begins with."""
    return {"id": reply_id, "object": kind, "created": int(time.time()), "model": model}


def finish_name(state: RequestState) -> str | None:
    return None if state.finish is None else state.finish.type


def finish_fields(state: RequestState) -> dict[str, Any]:
    """Extensions of a finished choice: what stopped it and what the sparse cache did."""
    fields: dict[str, Any] = {}
    if state.finish is not None:
        fields["matched_stop"] = state.finish.matched
        if state.tca is not None:
            fields["tca"] = state.tca
    return fields


def usage(states: Sequence[RequestState], samples: int) -> dict[str, Any]:
    """Token counts of a call; each prompt counts once, however many samples it has."""
    first_samples = states[::samples]
    prompt = sum(state.prompt_tokens for state in first_samples)
    completion = sum(len(state.output_ids) for state in states)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(state.cached_tokens for state in first_samples)
        },
    }
