"""Worker: the scheduler's loop and engine alone, fed from memory.

No HTTP, no tokeniser, no ZMQ and no detokeniser: the time of a request here is what the server
as a whole is compared with.
"""

from __future__ import annotations

import os
import sys
import time

# As the launcher sets it for its scheduler; it counts only before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from benchmark.workers.pipe import Json, answer_questions
from tca_runtime.config import parse_args
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.grammar import GrammarCompiler
from tca_runtime.garbage import settle_garbage
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.in_memory import in_memory_scheduler
from tca_runtime.tokenizer.loading import load_tokenizer


def main() -> None:
    """Take the server's flags, then answer ``text`` + ``new_tokens`` questions with seconds."""
    config = parse_args(sys.argv[1:])
    engine = Engine(config)
    engine.warm_up()
    model = engine.model_config
    tokenizer = load_tokenizer(config.model)
    grammars = GrammarCompiler(tokenizer, model.vocab_size, model.eos_token_ids)
    length = config.model.context_length or model.max_position
    scheduler, inbox, outbox = in_memory_scheduler(config, engine, length, grammars)
    # As the scheduler process does.
    settle_garbage()

    def handle(question: Json) -> Json:
        ids = tokenizer.encode(question["text"])
        sampling = SamplingParams(
            max_new_tokens=question["new_tokens"], temperature=0.0, ignore_eos=True
        )
        outbox.outputs.clear()
        inbox.submit("r", ids, sampling)
        start = time.perf_counter()
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
