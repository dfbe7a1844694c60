"""A scheduler without a model, behind the real channels: it answers with scripted tokens.

A request's ``custom_params`` are its script: ``answer`` (text), ``per_message`` (tokens in one
output), ``delay`` (seconds between outputs), ``error`` ([status, message]), ``hang`` (wait for an
abort) and ``tca``.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq
from transformers import PreTrainedTokenizerFast

from tca_runtime.channels import Receiver, Sender
from tca_runtime.messages import (
    AbortRequest,
    Control,
    ControlReply,
    FinishReason,
    GenerateRequest,
    Heartbeat,
    LogprobOptions,
    SchedulerFailed,
    TokenBatch,
    TokenLogprob,
    TokenOutput,
    TopLogprobs,
    ToScheduler,
    ToTokenizer,
)

DEFAULT_ANSWER = "hello world, the quick brown fox"
CONTEXT_LENGTH = 512
SCRIPT = ("answer", "per_message", "delay", "error", "hang", "tca")
STATE: dict[str, Any] = {
    "num_running_reqs": 2,
    "max_running_requests": 64,
    "num_waiting_reqs": 1,
    "num_waiting_uncached_tokens": 7,
    "num_grammar_reqs": 0,
    "num_retracted_reqs": 0,
    "num_retractions": 3,
    "reclaimed_slots": {"demoted": 4, "pruned": 5, "evicted": 6, "promoted": 7},
    "num_steps": 8,
    "step_seconds_total": 0.5,
    "max_total_num_tokens": 1000,
    "available_tokens": 750,
    "gen_throughput": 12.5,
    "cache_hit_rate": 0.5,
    "kv_cache": {"total_slots": 100, "free_slots": 60, "tree_slots": 30, "running_slots": 10},
}


def logprob_of(token_id: int) -> float:
    return -0.1 - token_id / 1000


@dataclass
class Script:
    message: GenerateRequest
    prompt: list[int]
    tokens: list[int]
    end: FinishReason
    due: float
    sent: int = 0
    finish: FinishReason | None = None

    def option(self, name: str, default: Any = None) -> Any:
        return self.message.sampling.custom_params.get(name, default)


class FakeScheduler:
    """Runs in a thread until ``stop``. ``received`` and ``aborted`` are what it was told.

    While ``silent`` is set it sends no heartbeats, while ``deaf`` is set it answers no controls.
    While ``full`` is set it refuses new requests, while ``starving`` is set it lets them wait.
    While ``stepping`` is set every heartbeat tells of one more step.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, inbox_address: str, outbox_address: str
    ) -> None:
        self.received: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.controls: list[Control] = []
        self.silent = threading.Event()
        self.deaf = threading.Event()
        self.full = threading.Event()
        self.starving = threading.Event()
        self.stepping = threading.Event()
        self._tokenizer = tokenizer
        self._context = zmq.Context()
        self._inbox: Receiver[ToScheduler] = Receiver(self._context, inbox_address, ToScheduler)
        self._outbox: Sender[ToTokenizer] = Sender(self._context, outbox_address)
        self._active: dict[str, Script] = {}
        self._stopping = threading.Event()
        self._death: str | None = None
        self._last_beat = 0.0
        self._num_steps: int = STATE["num_steps"]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def num_active(self) -> int:
        return len(self._active)

    def die(self, reason: str) -> None:
        self._death = reason
        self._thread.join(10)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)
        self._context.destroy(linger=0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            for message in self._inbox.drain(0 if self._active else 5):
                self._handle(message)
            if self._death is not None:
                self._outbox.send(SchedulerFailed(traceback=self._death))
                return
            self._step()
            if not self.silent.is_set() and time.monotonic() - self._last_beat > 0.1:
                self._last_beat = time.monotonic()
                self._num_steps += self.stepping.is_set()
                self._outbox.send(Heartbeat(state={**STATE, "num_steps": self._num_steps}))

    def _handle(self, message: ToScheduler) -> None:
        if isinstance(message, GenerateRequest):
            self.received.append(message)
            if self.full.is_set():
                reason = FinishReason("abort", message="the queue is full", status=503)
                output = TokenOutput(rid=message.rid, token_ids=[], finish=reason)
                self._outbox.send(TokenBatch(outputs=[output]))
            elif not self.starving.is_set():
                self._active[message.rid] = self._script(message)
        elif isinstance(message, AbortRequest):
            self.aborted.append(message.rid)
            for rid, script in self._active.items():
                if not message.rid or rid == message.rid:
                    script.finish = FinishReason("abort", message="aborted", status=499)
        elif isinstance(message, Control):
            self.controls.append(message)
            if not self.deaf.is_set():
                self._outbox.send(self._reply(message))

    def _reply(self, message: Control) -> ControlReply:
        if message.action == "flush_cache" and self._active:
            return ControlReply(call_id=message.call_id, ok=False, message="requests are running")
        payload = {"state": STATE, "tree": {"nodes": [], **message.args}}.get(message.action, {})
        return ControlReply(
            call_id=message.call_id, ok=True, message=f"{message.action} done", payload=payload
        )

    def _script(self, message: GenerateRequest) -> Script:
        sampling = message.sampling
        answer = str(sampling.custom_params.get("answer", DEFAULT_ANSWER))
        tokens: list[int] = self._tokenizer.encode(answer, add_special_tokens=False)
        eos = self._tokenizer.eos_token_id
        end = FinishReason("stop", matched=eos)
        tokens.append(eos)
        for i, token in enumerate(tokens):
            if token in sampling.stop_token_ids:
                tokens, end = tokens[: i + 1], FinishReason("stop", matched=token)
                break
        if len(tokens) > sampling.max_new_tokens:
            tokens = tokens[: sampling.max_new_tokens]
            end = FinishReason("length", length=len(tokens))
        prompt = np.frombuffer(message.input_ids, dtype="<i4").tolist()
        return Script(message, prompt, tokens, end, due=time.monotonic())

    def _step(self) -> None:
        now = time.monotonic()
        ready = [s for s in self._active.values() if s.finish is not None or s.due <= now]
        outputs = [output for s in ready if (output := self._advance(s)) is not None]
        if outputs:
            self._outbox.send(TokenBatch(outputs=outputs))
        else:
            time.sleep(0.001)

    def _advance(self, script: Script) -> TokenOutput | None:
        error = script.option("error")
        if isinstance(error, list):
            script.finish = FinishReason("abort", message=error[1], status=error[0])
        if script.finish is not None:
            del self._active[script.message.rid]
            return TokenOutput(rid=script.message.rid, token_ids=[], finish=script.finish)
        if script.option("hang"):
            return None
        begin = script.sent
        script.sent = min(begin + script.option("per_message", 1), len(script.tokens))
        script.due = time.monotonic() + script.option("delay", 0.0)
        output = TokenOutput(
            rid=script.message.rid,
            token_ids=script.tokens[begin : script.sent],
            cached_tokens=len(script.prompt) // 2,
            tca=script.option("tca"),
        )
        self._add_logprobs(script, output, first=begin == 0)
        if script.sent == len(script.tokens):
            output.finish = script.end
            del self._active[script.message.rid]
        return output

    def _add_logprobs(self, script: Script, output: TokenOutput, first: bool) -> None:
        options = script.message.logprobs
        if options is None:
            return
        output.output_logprobs = [(logprob_of(t), t) for t in output.token_ids]
        if first:
            output.input_logprobs = [
                (logprob_of(token) if options.start + i else None, token)
                for i, token in enumerate(script.prompt[options.start :])
            ]
        if options.top_k or options.token_ids:
            listed = _listed(options)
            output.output_top_logprobs = TopLogprobs([listed] * len(output.token_ids))
            if first:
                missing: list[list[TokenLogprob] | None] = [None] if options.start == 0 else []
                rest = len(script.prompt) - options.start - len(missing)
                output.input_top_logprobs = TopLogprobs(missing + [listed] * rest)


def _listed(options: LogprobOptions) -> list[TokenLogprob]:
    return [(logprob_of(t), t) for t in (*range(options.top_k), *options.token_ids)]
