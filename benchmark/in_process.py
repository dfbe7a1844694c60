"""The scheduler's loop and engine alone, fed from memory: no HTTP, no ZMQ, no second process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tca_runtime.config import RuntimeConfig
from tca_runtime.engine.engine import Engine
from tca_runtime.messages import TokenOutput
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.in_memory import in_memory_scheduler


@dataclass(frozen=True)
class Answer:
    """One request's tokens and what the server says about them."""

    token_ids: list[int]
    cached_tokens: int
    tca: dict[str, Any] | None


class Pending:
    """A request on its way."""

    def __init__(self, rid: str, outputs: list[TokenOutput]) -> None:
        self._rid = rid
        self._outputs = outputs

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self._mine() for token in output.token_ids]

    @property
    def is_finished(self) -> bool:
        mine = self._mine()
        return bool(mine) and mine[-1].finish is not None

    def answer(self) -> Answer:
        """The whole answer of a finished request.

        Raises
        ------
        RuntimeError
            When the scheduler refused it.
        """
        last = self._mine()[-1]
        if last.finish is not None and last.finish.type == "abort":
            raise RuntimeError(f"request refused: {last.finish.message}")
        return Answer(self.token_ids, last.cached_tokens, last.tca)

    def _mine(self) -> list[TokenOutput]:
        return [output for output in self._outputs if output.rid == self._rid]


class InProcessServer:
    """Answers greedy requests. Grammars are not served here."""

    def __init__(self, config: RuntimeConfig) -> None:
        self.engine = Engine(config)
        self.engine.warm_up()
        length = config.model.context_length or self.engine.model_config.max_position
        made = in_memory_scheduler(config, self.engine, length)
        self.scheduler, self._inbox, self._outbox = made
        # Every token is sent as soon as it is there.
        self.scheduler.stream_interval = 0.0
        self._count = 0

    def submit(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        ignore_eos: bool = False,
        **custom_params: Any,
    ) -> Pending:
        """Hand a request to the scheduler, whose ``run_once`` computes it."""
        self._count += 1
        rid = str(self._count)
        sampling = SamplingParams(
            max_new_tokens=new_tokens,
            temperature=0.0,
            ignore_eos=ignore_eos,
            custom_params=custom_params,
        )
        self._inbox.submit(rid, prompt, sampling)
        return Pending(rid, self._outbox.outputs)

    def ask(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, **custom_params: Any
    ) -> list[Answer]:
        """Answer all prompts at once."""
        self._outbox.outputs.clear()
        pending = [self.submit(prompt, new_tokens, **custom_params) for prompt in prompts]
        while not all(request.is_finished for request in pending):
            self.scheduler.run_once()
        return [request.answer() for request in pending]
