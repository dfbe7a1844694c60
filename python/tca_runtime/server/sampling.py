"""From the sampling fields of a body to ``SamplingParams``: defaults and every range check."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import msgspec

from tca_runtime.sampling_params import Grammar, SamplingParams
from tca_runtime.server.schemas import JsonObject, SamplingBody, check_supported
from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.manager import Limits
from tca_runtime.tokenizer.stops import MAX_STOPS

MAX_SAMPLES = 128
MAX_STOP_IDS = 1024
MAX_STOP_LENGTH = 1 << 12
MAX_GRAMMAR_LENGTH = 1 << 18
MAX_CUSTOM_BYTES = 1024
_MAX_NESTING = 64
_INT64 = range(-(2**63), 2**63)
_DEFAULTS = SamplingParams()


class SamplingTemplate:
    """Sampling parameters for any number of prompts, which share what does not depend on them.

    Raises
    ------
    RequestError
        400 with the name of the field that is out of range; from ``for_prompt`` as well.
    """

    def __init__(self, body: SamplingBody, limits: Limits) -> None:
        self._body = body
        self._limits = limits
        self._params = _without_lengths(body, limits)

    def for_prompt(self, prompt_tokens: int) -> SamplingParams:
        """The parameters of a request whose prompt has ``prompt_tokens`` tokens."""
        max_new_tokens, min_new_tokens = _lengths(self._body, prompt_tokens, self._limits)
        return msgspec.structs.replace(
            self._params, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens
        )


def _without_lengths(body: SamplingBody, limits: Limits) -> SamplingParams:
    check_supported(body)
    if body.beam_width is not None and body.beam_width > 1:
        raise RequestError("beam search is not supported", param="beam_width")
    stop_token_ids = tuple(i for i in body.stop_token_ids or () if i is not None)
    check_token_ids("stop_token_ids", stop_token_ids, limits)
    _require(
        len(stop_token_ids) <= MAX_STOP_IDS,
        "stop_token_ids",
        f"at most {MAX_STOP_IDS} ids",
        len(stop_token_ids),
    )
    logit_bias = body.logit_bias or {}
    check_token_ids("logit_bias", logit_bias, limits)
    return SamplingParams(
        temperature=_number("temperature", body.temperature, 0.0, float("inf")),
        top_p=_positive("top_p", body.top_p, 1.0),
        top_k=_top_k(body.top_k, limits),
        min_p=_number("min_p", body.min_p, 0.0, 1.0),
        repetition_penalty=_positive("repetition_penalty", body.repetition_penalty, 2.0),
        frequency_penalty=_number("frequency_penalty", body.frequency_penalty, -2.0, 2.0),
        presence_penalty=_number("presence_penalty", body.presence_penalty, -2.0, 2.0),
        stop=_stops("stop", body.stop),
        stop_token_ids=stop_token_ids,
        stop_regex=_stops("stop_regex", body.stop_regex),
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=_flag(body.skip_special_tokens, True),
        no_stop_trim=bool(body.no_stop_trim),
        logit_bias=logit_bias,
        n=_sample_count(body.n),
        seed=_seed(body),
        grammar=_grammar(body),
        custom_params=_custom_params(body.custom_params or {}, limits),
    )


def check_token_ids(name: str, ids: Collection[int], limits: Limits) -> None:
    if ids and (min(ids) < 0 or max(ids) >= limits.vocab_size):
        wrong = next(i for i in ids if not 0 <= i < limits.vocab_size)
        raise RequestError(
            f"{name} has the token id {wrong}, which is not in [0, {limits.vocab_size - 1}]",
            param=name,
        )


def check_int64(name: str, value: int) -> None:
    _require(value in _INT64, name, "a 64-bit integer", value)


def _require(condition: bool, name: str, expected: str, value: Any) -> None:
    if not condition:
        raise RequestError(f"{name} must be {expected}, got {value}", param=name)


def _flag(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _number(name: str, value: float | None, low: float, high: float) -> float:
    if value is None:
        return float(getattr(_DEFAULTS, name))
    _require(low <= value <= high, name, f"in [{low:g}, {high:g}]", value)
    return value


def _positive(name: str, value: float | None, high: float) -> float:
    if value is None:
        return float(getattr(_DEFAULTS, name))
    _require(0.0 < value <= high, name, f"in (0, {high:g}]", value)
    return value


def _top_k(value: int | None, limits: Limits) -> int:
    if value is None or value == -1:
        return -1
    _require(value >= 1, "top_k", "-1 (off) or at least 1", value)
    return min(value, limits.vocab_size)


def _sample_count(n: int | None) -> int:
    count = 1 if n is None else n
    _require(1 <= count <= MAX_SAMPLES, "n", f"in [1, {MAX_SAMPLES}]", count)
    return count


def _seed(body: SamplingBody) -> int | None:
    seed = body.sampling_seed if body.seed is None else body.seed
    if seed is None:
        return None
    check_int64("seed", seed)
    return seed & (2**63 - 1)


def _lengths(body: SamplingBody, prompt_tokens: int, limits: Limits) -> tuple[int, int]:
    room = limits.context_length - prompt_tokens
    maximum = room if body.max_new_tokens is None else body.max_new_tokens
    minimum = body.min_new_tokens or 0
    _require(maximum >= 0, "max_new_tokens", "at least 0", maximum)
    if maximum > room:
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens and max_new_tokens is {maximum}, together "
            f"{prompt_tokens + maximum}, but the context length is {limits.context_length} tokens",
            param="max_new_tokens",
        )
    _require(0 <= minimum <= maximum, "min_new_tokens", f"in [0, {maximum}]", minimum)
    return maximum, minimum


def _stops(name: str, value: str | list[str] | list[str | None] | None) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value or []
    stops = tuple(dict.fromkeys(v for v in values if v))
    longest = max(map(len, stops), default=0)
    _require(longest <= MAX_STOP_LENGTH, name, f"at most {MAX_STOP_LENGTH} characters", longest)
    _require(len(stops) <= MAX_STOPS, name, f"at most {MAX_STOPS} strings", len(stops))
    return stops


def _grammar(body: SamplingBody) -> Grammar | None:
    given = {
        "regex": body.regex,
        "json_schema": body.json_schema,
        "ebnf": body.ebnf,
    }
    chosen = {name: value for name, value in given.items() if value}
    if not chosen:
        return None
    if len(chosen) > 1:
        raise RequestError(f"only one of {', '.join(chosen)} can be given")
    ((name, value),) = chosen.items()
    if name == "json_schema":
        return Grammar("json_schema", _schema_text(value))
    assert isinstance(value, str)
    _check_length(name, value)
    return Grammar("regex" if name == "regex" else "ebnf", value)


def _schema_text(schema: str | JsonObject | None) -> str:
    if isinstance(schema, str):
        try:
            parsed = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"json_schema is not JSON: {error}", param="json_schema") from None
    else:
        parsed, schema = schema, json.dumps(schema)
    _require(isinstance(parsed, dict | bool), "json_schema", "a JSON schema object", schema)
    _check_length("json_schema", schema)
    return schema


def _custom_params(given: JsonObject, limits: Limits) -> JsonObject:
    known = {name: given[name] for name in limits.custom_params if name in given}
    _check_nesting("custom_params", known)
    size = len(msgspec.json.encode(known))
    _require(size <= MAX_CUSTOM_BYTES, "custom_params", f"at most {MAX_CUSTOM_BYTES} bytes", size)
    return known


def _check_length(name: str, value: str) -> None:
    if len(value) > MAX_GRAMMAR_LENGTH:
        raise RequestError(
            f"{name} has {len(value)} characters, the limit is {MAX_GRAMMAR_LENGTH}", param=name
        )


def _check_nesting(name: str, value: Any) -> None:
    # The scheduler decodes this too: what it could not decode must not reach it.
    level = [value]
    for _ in range(_MAX_NESTING):
        level = [child for node in level for child in _children(name, node)]
        if not level:
            return
    raise RequestError(f"{name} is nested more than {_MAX_NESTING} levels deep", param=name)


def _children(name: str, node: Any) -> list[Any]:
    if isinstance(node, int):
        check_int64(name, node)
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []
