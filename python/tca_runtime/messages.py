"""Everything that crosses ZMQ: one tagged union per receiving process.

``ToScheduler`` flows from the tokenizer process to the scheduler process, ``ToTokenizer`` flows
back. Both directions are msgpack; nothing is pickled. Rules both sides rely on:

* every ``GenerateRequest`` gets exactly one ``TokenOutput`` with ``finish`` set, also after
  ``AbortRequest`` (whose only effect is to mark the request);
* every ``Control`` gets exactly one ``ControlReply`` with the same ``call_id``.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tca_runtime.sampling_params import SamplingParams

# [logprob or None, token id]; None only at absolute position 0 of a prompt.
TokenLogprob = tuple[float | None, int]


class _Message(msgspec.Struct, tag=True, kw_only=True):
    pass


class LogprobOptions(msgspec.Struct, frozen=True, array_like=True):
    """``start``: first prompt position whose logprob is wanted (prompt length = none)."""

    start: int
    top_k: int = 0
    token_ids: tuple[int, ...] = ()


class GenerateRequest(_Message):
    """One prompt to continue. ``input_ids`` is packed little-endian int32.

    Without ``incremental`` the tokens between the first and the last are told together: nobody
    looks at them before, and every message takes the tokenizer process a core for a while.

    Requests of higher ``priority`` are admitted first; those of one ``client`` share its part of
    the server; those of different ``extra_key`` share no cached prefix.
    """

    rid: str
    input_ids: bytes
    sampling: SamplingParams
    logprobs: LogprobOptions | None = None
    extra_key: str | None = None
    priority: int = 0
    incremental: bool = True
    client: str = ""


class AbortRequest(_Message):
    """Marks one request, or all of them when ``rid`` is empty."""

    rid: str


class Control(_Message):
    """A question or command about the whole scheduler."""

    call_id: str
    action: Literal["flush_cache", "state", "tree", "start_profile", "stop_profile"]
    args: dict[str, Any] = {}


class FinishReason(msgspec.Struct, frozen=True, array_like=True):
    """Why a request ended.

    ``matched`` is the stop token id or stop string; ``message`` and ``status`` (an HTTP status)
    describe an abort.
    """

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str = ""
    status: int = 0


class TopLogprobs(msgspec.Struct, array_like=True):
    """Of each position the ``top_k`` best tokens, best first, then the ids asked for in their
    order; None where a position has none."""

    positions: list[list[TokenLogprob] | None]


class TokenOutput(_Message):
    """New tokens of one request; the terminal one carries ``finish``.

    ``input_logprobs`` comes once, with the first output. Prompt entries align with
    ``input_ids[start:]``. ``tca`` is what selection did (kept ratio, dropped mass, ...).
    """

    rid: str
    token_ids: list[int]
    finish: FinishReason | None = None
    cached_tokens: int = 0
    num_retractions: int = 0
    queue_seconds: float = 0.0
    input_logprobs: list[TokenLogprob] | None = None
    input_top_logprobs: TopLogprobs | None = None
    output_logprobs: list[TokenLogprob] | None = None
    output_top_logprobs: TopLogprobs | None = None
    tca: dict[str, Any] | None = None


class TokenBatch(_Message):
    """All outputs of one scheduler step."""

    outputs: list[TokenOutput]


class ControlReply(_Message):
    """The answer to ``Control``: ``message`` says what was done, or why not."""

    call_id: str
    ok: bool
    message: str = ""
    payload: dict[str, Any] = {}


class SchedulerReady(_Message):
    """The model is loaded and the loop runs. ``info`` is merged into ``/server_info``."""

    info: dict[str, Any]


class SchedulerFailed(_Message):
    """The scheduler is about to exit; nothing more will follow.

    ``reason``: what to tell the user when it is no crash but, say, a broken model file.
    """

    traceback: str
    reason: str = ""


class Heartbeat(_Message):
    """Sent by the scheduler's loop between steps, about every half second.

    A step that takes longer delays it: silence alone does not tell a long step from a hang.
    """

    state: dict[str, Any]


ToScheduler = GenerateRequest | AbortRequest | Control
ToTokenizer = TokenBatch | ControlReply | SchedulerReady | SchedulerFailed | Heartbeat
