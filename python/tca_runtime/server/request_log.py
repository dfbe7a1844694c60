"""One log line per request that ended."""

from __future__ import annotations

import logging
from typing import Any

from tca_runtime.tokenizer.state import RequestState

logger = logging.getLogger("tca_runtime.requests")

_MAX_RID = 128


def log_request(state: RequestState, new_tokens: int) -> None:
    """Take a change of an output, see ``manager.Observer``; only the last one is logged."""
    finish = state.finish
    if finish is None:
        return
    failed = finish.type == "abort" and finish.status >= 500
    level = logging.WARNING if failed else logging.INFO
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "number": state.wire_id,
        "rid": state.request.rid[:_MAX_RID],
        "finish": finish.type,
        "prompt_tokens": state.prompt_tokens,
        "cached_tokens": state.cached_tokens,
        "completion_tokens": len(state.output_ids),
        "queue_seconds": state.queue_seconds,
        "first_token_seconds": state.first_token and state.first_token - state.request.arrived,
        "seconds": state.latency,
    }
    if finish.type == "abort":
        fields |= {"status": finish.status, "reason": finish.message}
    if state.num_retractions:
        fields["num_retractions"] = state.num_retractions
    logger.log(level, "request ended", extra={"fields": fields})
