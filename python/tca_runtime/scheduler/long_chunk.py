"""A chunk that should not be cut, computed while other requests decode."""

from __future__ import annotations

from dataclasses import dataclass

from tca_runtime.engine.step import BegunStep
from tca_runtime.scheduler.planner import PlannedChunk


@dataclass(eq=False)
class LongChunk:
    """A prefill chunk of which a few layers run between two decode steps.

    The queries of a chunk that selects belong together, because the last of them choose for all;
    far into a prompt, small chunks would read what is before them too often. A chunk's layers do
    not belong together: K and V that a layer writes are read by the next chunk only.

    ``credit`` are prompt tokens that earlier budgets left, less than a layer is worth.
    """

    chunk: PlannedChunk
    step: BegunStep
    num_layers: int
    credit: int = 0

    def advance(self, budget: int) -> int:
        """Launch as many layers as take as long as ``budget`` prompt tokens do, at least one.

        Returns
        -------
        The prompt tokens whose computation would have taken as long.
        """
        weight, before = self.chunk.weight, self.step.layers_left
        self.step.advance(max(1, (self.credit + budget) * self.num_layers // weight))
        worth = -(-weight * (before - self.step.layers_left) // self.num_layers)
        self.credit = max(0, self.credit + budget - worth)
        return worth

    @property
    def is_done(self) -> bool:
        return not self.step.layers_left
