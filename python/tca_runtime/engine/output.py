"""From hidden states to sampled tokens and log-probabilities, some time after the launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tca_runtime.engine.logprobs import PendingLogprobs, prompt_logprobs, token_logprobs
from tca_runtime.engine.sampler import RowSampling, Sampler
from tca_runtime.engine.step import ChunkInput, LogprobWish, PositionLogprobs, StepInput, StepOutput
from tca_runtime.engine.upload import download, upload_ints
from tca_runtime.models.base import CausalLM, ForwardPass
from tca_runtime.sparsity.chooser import DecodeView


class StartedStep:
    """A step whose parts are queued little by little (``BegunStep``)."""

    def __init__(self, forward: ForwardPass, finish: Callable[[], LaunchedStep]) -> None:
        self._forward = forward
        self._finish = finish

    @torch.inference_mode()
    def advance(self, num_parts: int) -> None:
        """See ``BegunStep``."""
        self._forward.advance(num_parts)

    @property
    def parts_left(self) -> int:
        """See ``BegunStep``."""
        return self._forward.parts_left

    def finish(self) -> LaunchedStep:
        """See ``BegunStep``."""
        return self._finish()


class LaunchedStep:
    """A forward pass on its way through the device, and what is left of its step (``PendingStep``).

    Tokens go from the sampler to the token buffer, where the next step reads them, and to pinned
    memory, where the host reads them when it has the time. Only ``result`` waits for the device.

    Draws of constrained requests wait for ``sample``: a grammar must have seen the last token. The
    forward pass has not, so the device computes while the host follows the grammar.
    """

    def __init__(
        self,
        model: CausalLM,
        sampler: Sampler,
        step: StepInput,
        hidden: Tensor,
        decode_views: Sequence[DecodeView | None],
        token_buffer: Tensor,
        places: Tensor | None = None,
    ) -> None:
        """
        Parameters
        ----------
        decode_views : see ``PendingStep``
        hidden : ``[T, hidden]``, the states of the step's tokens, or only of those that sample
        token_buffer : int64, the newest token of every row of the view table
        places : int64 ``[N]``, the rows of the requests that sample, where the device has them
        """
        self.decode_views = decode_views
        self._model, self._sampler, self._step = model, sampler, step
        self._token_buffer = token_buffer
        self._rows: list[RowSampling] = [d.sampling for d in step.decode]
        self._wishes: list[LogprobWish | None] = [d.logprobs for d in step.decode]
        views = [d.sequence.view.index for d in step.decode]
        self._prompts: list[list[PendingLogprobs]] = []
        begin = len(step.decode)
        for chunk in step.chunks:
            states = hidden[begin : begin + len(chunk.tokens)]
            begin += len(chunk.tokens)
            self._prompts.append([p.download() for p in _prompt(model, chunk, states)])
            if chunk.sampling is not None:
                self._rows.append(chunk.sampling)
                self._wishes.append(chunk.logprobs)
                views.append(chunk.sequence.view.index)
        if len(views) < len(hidden):
            hidden = hidden[upload_ints(step.sampling_places, hidden.device)]
        self._places = upload_ints(views, hidden.device) if places is None else places
        self._hidden: Tensor | None = hidden
        if not any(row.matcher for row in self._rows):
            self.sample()

    @torch.inference_mode()
    def sample(self) -> None:
        """Draw, and send everything on its way to the host; once. See ``PendingStep``."""
        if self._hidden is None:
            return
        hidden, self._hidden = self._hidden, None
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._logprobs: PendingLogprobs | None = None
        self._wanted = [i for i, wish in enumerate(self._wishes) if wish is not None]
        if self._rows:
            logits = self._model.logits(hidden)
            tokens = self._sampler.sample(logits, self._rows)
            self._token_buffer[self._places] = tokens
            self._tokens = download(tokens)
            if self._wanted:
                index = upload_ints(self._wanted, logits.device)
                chosen = [wish for wish in self._wishes if wish is not None]
                self._logprobs = token_logprobs(logits[index], tokens[index], chosen).download()
        self._dropped = [download(v.dropped_mass) if v else None for v in self.decode_views]
        self._arrived: torch.cuda.Event | None = None
        if hidden.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def result(self) -> StepOutput:
        """See ``PendingStep``."""
        self.sample()
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens = self._tokens.tolist()
        entries: list[PositionLogprobs | None] = [None] * len(tokens)
        if self._logprobs is not None:
            for i, entry in zip(self._wanted, self._logprobs.entries(), strict=True):
                entries[i] = entry
        num_decode = len(self._step.decode)
        sampled = iter(zip(tokens[num_decode:], entries[num_decode:], strict=True))
        ends = [
            next(sampled) if chunk.sampling is not None else (None, None)
            for chunk in self._step.chunks
        ]
        return StepOutput(
            decode_tokens=tokens[:num_decode],
            chunk_tokens=[token for token, _ in ends],
            decode_logprobs=entries[:num_decode],
            chunk_logprobs=[entry for _, entry in ends],
            prompt_logprobs=[[e for part in p for e in part.entries()] for p in self._prompts],
            dropped_mass=[None if mass is None else float(mass) for mass in self._dropped],
        )


def _prompt(model: CausalLM, chunk: ChunkInput, states: Tensor) -> list[PendingLogprobs]:
    if chunk.prompt_targets is None or chunk.logprobs is None:
        return []
    wanted = states[chunk.prompt_offset :][: len(chunk.prompt_targets)]
    return prompt_logprobs(model.logits, wanted, chunk.prompt_targets, chunk.logprobs)
