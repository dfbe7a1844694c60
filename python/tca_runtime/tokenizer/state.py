"""One output while it grows: tokens in, text and logprobs out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tca_runtime.messages import FinishReason, LogprobOptions, TokenLogprob, TokenOutput
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.tokenizer.detokenizer import Detokenizer, TokenTable
from tca_runtime.tokenizer.stops import StopChecker, compile_patterns

# [logprob, token id, token text]; the text is None unless it was asked for.
LogprobEntry = tuple[float | None, int, str | None]


@dataclass(frozen=True)
class TextRequest:
    """One prompt and what to do with it. ``sampling.n`` outputs are made of it.

    ``stream``: the client reads the text while it grows. ``arrived`` is when its call came in, by
    ``time.perf_counter``. ``part_of`` are the rids of what it belongs to: a call of several
    prompts, a prompt of several samples.
    """

    rid: str
    input_ids: Sequence[int]
    sampling: SamplingParams
    logprobs: LogprobOptions | None = None
    logprob_text: bool = False
    extra_key: str | None = None
    priority: int = 0
    stream: bool = False
    client: str = ""
    arrived: float = field(default_factory=time.perf_counter)
    part_of: tuple[str, ...] = ()


@dataclass
class Logprobs:
    """Log probabilities of an output so far.

    Prompt entries align with ``input_ids[start:]``; the first of them has no value only at
    position 0. ``*_top`` and ``*_ids`` have one list per position, None where there is none.
    """

    input: list[LogprobEntry] = field(default_factory=list)
    output: list[LogprobEntry] = field(default_factory=list)
    input_top: list[list[LogprobEntry] | None] = field(default_factory=list)
    output_top: list[list[LogprobEntry] | None] = field(default_factory=list)
    input_ids: list[list[LogprobEntry] | None] = field(default_factory=list)
    output_ids: list[list[LogprobEntry] | None] = field(default_factory=list)


class RequestState:
    """What is known of one output. Routes read it; only ``apply`` and ``fail`` change it.

    Attributes
    ----------
    index : position among the outputs of the client's call.
    wire_id : its name between the processes, and in their logs. A client may use a rid again
        while the scheduler is still busy dropping its first use, so the rid itself cannot tell
        outputs apart; and a long one would travel with every token.
    text : the final text so far; it only ever grows.
    output_ids : tokens so far, a stop token included.
    text_tokens : how many of them belong to the text.
    queue_seconds : how long it waited for admission.
    created, first_token, finished : when, by ``time.perf_counter``; 0.0 before.
    finish : set once, with the last change.
    """

    def __init__(
        self,
        request: TextRequest,
        index: int,
        wire_id: str,
        table: TokenTable,
        changed: asyncio.Event,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.index = index
        self.wire_id = wire_id
        self.text = ""
        self.output_ids: list[int] = []
        self.text_tokens = 0
        self.finish: FinishReason | None = None
        self.logprobs = Logprobs()
        self.cached_tokens = 0
        self.num_retractions = 0
        self.queue_seconds = 0.0
        self.first_token = 0.0
        self.tca: dict[str, Any] | None = None
        self.created = time.perf_counter()
        self.finished = 0.0
        self.updated = False
        self._changed = changed
        self._table = table
        self._detokenizer = Detokenizer(table, sampling.skip_special_tokens)
        self._stops = StopChecker(
            sampling.stop, compile_patterns(sampling.stop_regex), sampling.no_stop_trim
        )
        self._stop_ids = special_stops(sampling.stop, table)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.input_ids)

    @property
    def latency(self) -> float:
        """Seconds from the call to the finish."""
        return self.finished - self.request.arrived

    def apply(self, output: TokenOutput) -> None:
        """Take what the scheduler reports.

        A stop in the text ends the output before the reason that the scheduler gives, and drops
        the tokens after it.

        Raises
        ------
        RequestError
            If a stop pattern takes too long.
        """
        self.cached_tokens = output.cached_tokens
        self.num_retractions = output.num_retractions
        self.queue_seconds = output.queue_seconds
        if output.token_ids and not self.output_ids:
            self.first_token = time.perf_counter()
        self.tca = output.tca or self.tca
        pieces: list[str] = []
        stop_token = _stop_token(output)
        before = len(self.output_ids)
        last = len(output.token_ids) - 1
        if self._stops.is_empty and stop_token is None:
            # Nothing can end the text between two of them.
            self.output_ids += output.token_ids
            self.text_tokens += len(output.token_ids)
            pieces.append(self._detokenizer.feed_all(output.token_ids))
        else:
            for i, token_id in enumerate(output.token_ids):
                pieces.append(self._accept(token_id, is_stop=i == last and token_id == stop_token))
                if self.finish is not None:
                    break
        if self.finish is None and output.finish is not None:
            pieces.append(self._end(output.finish))
        self.text += "".join(pieces)
        self._take_logprobs(output, len(self.output_ids) - before)
        self._notify()

    def fail(self, reason: FinishReason) -> None:
        self.finish = reason
        self._notify()

    def _notify(self) -> None:
        if self.finish is not None:
            self.finished = time.perf_counter()
        self.updated = True
        self._changed.set()

    def _accept(self, token_id: int, is_stop: bool) -> str:
        sampling = self.request.sampling
        self.output_ids.append(token_id)
        armed = len(self.output_ids) > sampling.min_new_tokens
        if armed and token_id in self._stop_ids:
            return self._end(FinishReason("stop", matched=self._stop_ids[token_id]), token_id)
        if is_stop and not sampling.no_stop_trim:
            return ""
        self.text_tokens += 1
        piece = self._stops.feed(self._detokenizer.feed(token_id), armed)
        if self._stops.matched is not None:
            self.finish = FinishReason("stop", matched=self._stops.matched)
        return piece

    def _end(self, reason: FinishReason, stop_token: int | None = None) -> str:
        tail = ""
        if stop_token is not None and self.request.sampling.no_stop_trim:
            self.text_tokens += 1
            tail = self._detokenizer.feed(stop_token)
        piece = self._stops.feed(tail + self._detokenizer.flush())
        if self._stops.matched is not None:
            self.finish = FinishReason("stop", matched=self._stops.matched)
            return piece
        self.finish = reason
        return piece + self._stops.flush()

    def _take_logprobs(self, output: TokenOutput, accepted: int) -> None:
        if self.request.logprobs is None:
            return
        have = self.logprobs
        have.input += self._entries(output.input_logprobs or ())
        have.output += self._entries((output.output_logprobs or ())[:accepted])
        if output.input_top_logprobs is not None:
            for listed in output.input_top_logprobs.positions:
                have.input_top.append(self._best(listed))
                have.input_ids.append(self._asked(listed))
        if output.output_top_logprobs is not None:
            for listed in output.output_top_logprobs.positions[:accepted]:
                have.output_top.append(self._best(listed))
                have.output_ids.append(self._asked(listed))

    def _entries(self, pairs: Sequence[TokenLogprob]) -> list[LogprobEntry]:
        if not self.request.logprob_text:
            return [(logprob, token_id, None) for logprob, token_id in pairs]
        return [(logprob, token_id, self._table.text_of(token_id)) for logprob, token_id in pairs]

    # The scheduler lists the best tokens first, then the ones asked for by id.

    def _best(self, listed: list[TokenLogprob] | None) -> list[LogprobEntry] | None:
        assert self.request.logprobs is not None
        return None if listed is None else self._entries(listed[: self.request.logprobs.top_k])

    def _asked(self, listed: list[TokenLogprob] | None) -> list[LogprobEntry] | None:
        assert self.request.logprobs is not None
        return None if listed is None else self._entries(listed[self.request.logprobs.top_k :])


def special_stops(stops: tuple[str, ...], table: TokenTable) -> dict[int, str]:
    """Stop strings that are special tokens, by id: skipped tokens leave no text to be found in."""
    ids = {stop: table.special_id(stop) for stop in stops}
    return {token_id: stop for stop, token_id in ids.items() if token_id is not None}


def _stop_token(output: TokenOutput) -> int | None:
    finish = output.finish
    matched = finish.matched if finish is not None and finish.type == "stop" else None
    return matched if isinstance(matched, int) else None
