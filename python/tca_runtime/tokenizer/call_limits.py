"""What one call of a client may ask for with all its prompts and samples together."""

from __future__ import annotations

from collections.abc import Sequence

from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.state import TextRequest
from tca_runtime.tokenizer.stops import check_call

# Prompts times samples; as many as the default queue holds.
MAX_CALL_OUTPUTS = 4096
# Every output is told to the scheduler in a message of its own, and waits there with all it needs.
MAX_CALL_BYTES = 1 << 28
# An entry of a decoded dictionary: two numbers and their place.
_BIAS_BYTES = 128


def check_size(requests: Sequence[TextRequest]) -> None:
    """Refuse a call whose requests, each within its limits, are too much together.

    Raises
    ------
    RequestError
        Naming the limit; 413 if it is that of their bytes.
    """
    count = sum(request.sampling.n for request in requests)
    if count > MAX_CALL_OUTPUTS:
        raise RequestError(
            f"the call asks for {count} outputs, the limit is {MAX_CALL_OUTPUTS}", param="n"
        )
    size = sum(request.sampling.n * _num_bytes(request) for request in requests)
    if size > MAX_CALL_BYTES:
        raise RequestError(
            f"the {count} outputs of the call need {size} bytes for their prompts and parameters, "
            f"the limit is {MAX_CALL_BYTES}; ask for fewer at once",
            status=413,
        )
    check_call(request.sampling for request in requests)


def _num_bytes(request: TextRequest) -> int:
    sampling = request.sampling
    texts = [*sampling.stop, *sampling.stop_regex]
    if sampling.grammar is not None:
        texts.append(sampling.grammar.value)
    ids = len(request.input_ids) + len(sampling.stop_token_ids)
    return 4 * ids + sum(map(len, texts)) + _BIAS_BYTES * len(sampling.logit_bias)
