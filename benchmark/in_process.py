"""The scheduler's loop and engine alone, fed from memory: no HTTP, no ZMQ, no second process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from benchmark.workers.engine_loop import Inbox, Outbox
from tca_runtime.config import RuntimeConfig
from tca_runtime.engine.engine import Engine
from tca_runtime.messages import GenerateRequest
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.scheduler import Scheduler


@dataclass(frozen=True)
class Answer:
    """One request's tokens and what the server says about them."""

    token_ids: list[int]
    cached_tokens: int
    tca: dict[str, Any] | None


class InProcessServer:
    """Answers greedy requests. Grammars are not served here."""

    def __init__(self, config: RuntimeConfig) -> None:
        self.engine = Engine(config)
        self.engine.warm_up()
        self._inbox, self._outbox = Inbox(), Outbox()
        length = config.model.context_length or self.engine.model_config.max_position
        self.scheduler = Scheduler(
            config,
            self.engine,
            cast("Any", None),
            cast("Any", self._inbox),
            cast("Any", self._outbox),
            length,
        )

    def ask(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, **custom_params: Any
    ) -> list[Answer]:
        """Answer all prompts at once.

        Raises
        ------
        RuntimeError
            When the scheduler refuses one.
        """
        sampling = SamplingParams(
            max_new_tokens=new_tokens, temperature=0.0, custom_params=custom_params
        )
        outputs = self._outbox.outputs
        outputs.clear()
        for i, prompt in enumerate(prompts):
            packed = np.asarray(prompt, dtype="<i4").tobytes()
            self._inbox.messages.append(
                GenerateRequest(rid=str(i), input_ids=packed, sampling=sampling)
            )
        while sum(output.finish is not None for output in outputs) < len(prompts):
            self.scheduler.run_once()
        answers = []
        for i in range(len(prompts)):
            mine = [output for output in outputs if output.rid == str(i)]
            last = mine[-1]
            if last.finish is not None and last.finish.type == "abort":
                raise RuntimeError(f"request refused: {last.finish.message}")
            tokens = [token for output in mine for token in output.token_ids]
            answers.append(Answer(tokens, last.cached_tokens, last.tca))
        return answers
