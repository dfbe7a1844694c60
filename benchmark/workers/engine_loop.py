"""Worker: the scheduler's loop and engine alone, fed from memory.

No HTTP, no tokeniser, no ZMQ and no detokeniser: the time of a request here is what the server
as a whole is compared with.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

# As the launcher sets it for its scheduler; it counts only before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

import numpy as np

from benchmark.workers.pipe import Json, answer_questions
from tca_runtime.config import parse_args
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.grammar import GrammarCompiler
from tca_runtime.messages import GenerateRequest, TokenBatch, TokenOutput, ToScheduler, ToTokenizer
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.scheduler import Scheduler
from tca_runtime.tokenizer.loading import load_tokenizer

if TYPE_CHECKING:
    from tca_runtime.channels import Receiver, Sender


class Inbox:
    """What the scheduler reads instead of a ZMQ socket; never waits."""

    def __init__(self) -> None:
        self.messages: deque[ToScheduler] = deque()

    def drain(self, timeout_ms: int = 0) -> Iterator[ToScheduler]:
        while self.messages:
            yield self.messages.popleft()


class Outbox:
    """Where the scheduler sends; keeps outputs and when the last one came."""

    def __init__(self) -> None:
        self.outputs: list[TokenOutput] = []
        self.last = 0.0

    def send(self, message: ToTokenizer) -> None:
        if isinstance(message, TokenBatch):
            self.last = time.perf_counter()
            self.outputs += message.outputs


def main() -> None:
    """Take the server's flags, then answer ``text`` + ``new_tokens`` questions with seconds."""
    config = parse_args(sys.argv[1:])
    engine = Engine(config)
    engine.warm_up()
    model = engine.model_config
    tokenizer = load_tokenizer(config.model)
    inbox, outbox = Inbox(), Outbox()
    scheduler = Scheduler(
        config,
        engine,
        GrammarCompiler(tokenizer, model.vocab_size, model.eos_token_ids),
        cast("Receiver[ToScheduler]", inbox),
        cast("Sender[ToTokenizer]", outbox),
        config.model.context_length or model.max_position,
    )

    def handle(question: Json) -> Json:
        ids = tokenizer.encode(question["text"])
        sampling = SamplingParams(
            max_new_tokens=question["new_tokens"], temperature=0.0, ignore_eos=True
        )
        packed = np.asarray(ids, dtype="<i4").tobytes()
        outbox.outputs.clear()
        start = time.perf_counter()
        inbox.messages.append(GenerateRequest(rid="r", input_ids=packed, sampling=sampling))
        while not (outbox.outputs and outbox.outputs[-1].finish):
            scheduler.run_once()
        # The loop goes on with its own upkeep after the last reply; a client does not wait for it.
        return {
            "seconds": outbox.last - start,
            "prompt_tokens": len(ids),
            "output_ids": [t for output in outbox.outputs for t in output.token_ids],
        }

    answer_questions(handle)


if __name__ == "__main__":
    main()
