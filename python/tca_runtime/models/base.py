"""The face every model shows to the engine."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tca_runtime.attention.base import LayerAttention


class ForwardPass(Protocol):
    """A forward pass under way: other passes may run between its parts.

    A part is a layer, or a layer's work for some of the tokens.
    """

    def advance(self, num_parts: int) -> None:
        """Run the next parts, at most those that are left."""
        ...

    @property
    def parts_left(self) -> int:
        """Parts that have not run."""
        ...

    def hidden(self) -> Tensor:
        """Hidden states ``[T, hidden]`` after all parts and the final norm; of ``wanted`` only."""
        ...


class CausalLM(Protocol):
    """A decoder-only language model without a cache of its own."""

    def begin(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        part_tokens: int | None = None,
        wanted: Tensor | None = None,
    ) -> ForwardPass:
        """Prepare ``forward``, to be run part by part.

        Parameters
        ----------
        part_tokens : a part is a layer's work for so many tokens; ``attention`` is a
            ``SplitAttention`` then
        wanted : int64 ``[N]``, the tokens whose hidden states are asked for, all if None; behind
            the last attention nothing is computed for the others. If there are none, ``attention``
            only stores the last layer's keys and values
        """
        ...

    def forward(self, input_ids: Tensor, positions: Tensor, attention: LayerAttention) -> Tensor:
        """Run all layers over a flat batch of tokens.

        Parameters
        ----------
        input_ids, positions : int64 ``[T]``
        attention : stores K/V and attends, once per layer, in layer order

        Returns
        -------
        Hidden states ``[T, hidden]`` after the final norm.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Project ``[N, hidden]`` to float32 ``[N, vocab]``."""
        ...

    def output_projection(self, layer: int) -> Tensor:
        """Takes a layer's attention to the residual stream: ``[Hq * D, hidden]``."""
        ...

    def fingerprint(self) -> str:
        """Names the weights, whatever dtype and device they are loaded to."""
        ...
