"""From tokens to replies: finish checks and output messages."""

from __future__ import annotations

import math
from typing import Any

from tca_runtime.engine.step import PositionLogprobs
from tca_runtime.messages import FinishReason, TokenLogprob, TokenOutput, TopLogprobs
from tca_runtime.scheduler.request import Request
from tca_runtime.sparsity.chooser import DecodeView


def check_finish(request: Request, eos_ids: frozenset[int]) -> FinishReason | None:
    """Why the request ends after its newest token, if it does."""
    params = request.message.sampling
    token = int(request.tokens[request.num_tokens - 1])
    if token in params.stop_token_ids or (token in eos_ids and not params.ignore_eos):
        return FinishReason("stop", matched=token)
    if request.num_output >= request.max_new_tokens:
        return FinishReason("length", length=request.num_output)
    matcher = request.sampling.matcher
    if matcher is not None and matcher.is_terminated:
        return FinishReason("stop", matched=token)
    return None


def is_sure(request: Request, entry: PositionLogprobs | None) -> bool:
    """Whether a token drawn from the decode view was as likely as the request wants it."""
    if request.min_confidence is None or entry is None or entry.token[0] is None:
        return True
    return math.exp(entry.token[0]) >= request.min_confidence


def selection_report(
    request: Request, view: DecodeView, dropped_mass: float | None, retention: str
) -> dict[str, Any]:
    """What the client is told of a new decode view (``meta_info.tca``)."""
    report = view.report | {"dropped_mass": dropped_mass, "retention": retention}
    return report if request.raised_at is None else report | {"raised_at": request.raised_at}


def take_output(request: Request) -> TokenOutput:
    """What the client has not seen yet; moves the request's sent mark."""
    begin, end = request.num_sent, request.num_output
    first = begin == 0
    request.num_sent = end
    output = TokenOutput(
        rid=request.rid,
        token_ids=request.tokens[request.num_prompt + begin : request.num_tokens].tolist(),
        finish=request.finish,
        cached_tokens=request.cached_tokens or 0,
        num_retractions=request.num_retractions,
        queue_seconds=request.queue_seconds,
        tca=request.tca if request.finish is not None else None,
    )
    wish = request.message.logprobs
    if wish is None:
        return output
    ranked = bool(wish.top_k or wish.token_ids)
    new = request.output_logprobs[begin:end]
    output.output_logprobs = [entry.token for entry in new]
    if ranked:
        output.output_top_logprobs = TopLogprobs([entry.top for entry in new])
    if first:
        output.input_logprobs, tops = _prompt_entries(request)
        if ranked:
            output.input_top_logprobs = TopLogprobs(tops)
    return output


def _prompt_entries(
    request: Request,
) -> tuple[list[TokenLogprob], list[list[TokenLogprob] | None]]:
    """Entries aligned with ``input_ids[start:]``; position 0 has no logprob."""
    entries: list[PositionLogprobs] = request.prompt_logprobs
    tokens: list[TokenLogprob] = [entry.token for entry in entries]
    tops: list[list[TokenLogprob] | None] = [entry.top for entry in entries]
    if request.logprob_start == 0 and request.num_prompt:
        tokens.insert(0, (None, int(request.tokens[0])))
        tops.insert(0, None)
    return tokens, tops
