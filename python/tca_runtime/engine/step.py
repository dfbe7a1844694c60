"""What one forward pass takes and gives."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tca_runtime.cache.radix_tree import Tokens
from tca_runtime.cache.sequence import Sequence
from tca_runtime.engine.sampler import RowSampling
from tca_runtime.messages import TokenLogprob
from tca_runtime.sparsity.chooser import DecodeView, RequestSparsity


@dataclass(frozen=True)
class LogprobWish:
    """Log-probabilities wanted of one sampled token or of prompt tokens."""

    top_k: int = 0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class DecodeInput:
    """One running request: feed the token that its last step drew, which only the engine knows.

    ``refresh``: select a new decode view with its latest queries, this token's included.
    """

    sequence: Sequence
    sampling: RowSampling
    logprobs: LogprobWish | None = None
    refresh: RequestSparsity | None = None


@dataclass(frozen=True)
class ChunkInput:
    """Consecutive prompt tokens of one request, their slots already taken.

    Attributes
    ----------
    slots : int32 ``[rows, n]``
    sampling : set on the last chunk, which samples the request's next token
    prompt_offset, prompt_targets : the tokens from ``prompt_offset`` on predict these ids, whose
        logprobs are wanted
    sparsity : how the chunk's view and, after the last chunk, the decode view are selected; None
        for full attention
    ends_prompt : no more prompt tokens follow
    sees_past : the chunk attends to everything before it, whatever ``sparsity`` says
    """

    sequence: Sequence
    tokens: Tokens
    slots: Tensor
    sampling: RowSampling | None = None
    logprobs: LogprobWish | None = None
    prompt_offset: int = 0
    prompt_targets: Tokens | None = None
    sparsity: RequestSparsity | None = None
    ends_prompt: bool = True
    sees_past: bool = False


@dataclass(frozen=True)
class StepInput:
    """Decode requests first, then prefill chunks; either may be empty."""

    decode: Many[DecodeInput]
    chunks: Many[ChunkInput]

    @property
    def sampling_places(self) -> list[int]:
        """Where on the step's token axis the next tokens are drawn, in input order."""
        places = list(range(len(self.decode)))
        end = len(self.decode)
        for chunk in self.chunks:
            end += len(chunk.tokens)
            if chunk.sampling is not None:
                places.append(end - 1)
        return places


@dataclass(frozen=True)
class PositionLogprobs:
    """Logprob of one token, and of the other candidates asked for, best first."""

    token: TokenLogprob
    top: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class StepOutput:
    """Results in input order.

    Attributes
    ----------
    decode_tokens : one per decode request
    chunk_tokens : one per chunk, None where the chunk did not sample
    decode_logprobs, chunk_logprobs : of those tokens, None where not wanted
    prompt_logprobs : per chunk, one entry per prompt target
    dropped_mass : per decode request, then per chunk, of its new decode view; None without one
    """

    decode_tokens: list[int]
    chunk_tokens: list[int | None]
    decode_logprobs: list[PositionLogprobs | None]
    chunk_logprobs: list[PositionLogprobs | None]
    prompt_logprobs: list[list[PositionLogprobs]]
    dropped_mass: list[float | None]


class PendingStep(Protocol):
    """A step that was launched. Its tokens come later.

    What decides memory is known at once: budgets fix how long views are, so the cache can be
    planned on while the device computes.
    """

    @property
    def decode_views(self) -> Many[DecodeView | None]:
        """Per decode request, then per chunk, the view that its request should decode with next.

        None keeps what it sees.
        """
        ...

    def sample(self) -> None:
        """Draw the tokens if that had to wait for the host to see those of the step before.

        Must be called before the next step is launched.
        """
        ...

    def result(self) -> StepOutput:
        """Wait for the device and return everything."""
        ...


class BegunStep(Protocol):
    """A step of which not all parts were launched; other steps may be, between its parts.

    A part is a layer, or a layer's work for some of the tokens (``ForwardPass``).
    """

    def advance(self, num_parts: int) -> None:
        """Launch the next parts, at most those that are left."""
        ...

    @property
    def parts_left(self) -> int:
        """Parts that were not launched."""
        ...

    def finish(self) -> PendingStep:
        """Once no part is left: what remains of the step."""
        ...
