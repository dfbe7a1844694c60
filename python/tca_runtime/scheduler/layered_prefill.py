"""Prefill chunks that are computed while other requests decode."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tca_runtime.engine.step import BegunStep
from tca_runtime.scheduler.planner import PlannedChunk

# Decode steps with parts before them to one without.
REST_EVERY = 16


@dataclass(eq=False)
class LayeredPrefill:
    """Prefill chunks of which a few parts run between two decode steps.

    The queries of a chunk that selects belong together, because the last of them choose for all;
    far into a prompt, small chunks would read what is before them too often; and on a GPU a step
    that also prefills cannot be the captured graph that one of decoding is. A chunk's layers do
    not belong together: K and V that a layer writes are read by the next chunk only. Where the
    backend can, a part is less than a layer: once it has selected, its tokens are independent.

    How long a part takes is learnt from those launched before: the chunks' size, how much they see
    and their selection all count. So the first one runs alone, unless such chunks are known. Parts
    of a layer differ; where they run as they are launched, no other begins when the time is nearly
    up. Now and then a step has none, and shows what decoding alone takes by now.

    Attributes
    ----------
    part_seconds : what a part takes, as far as is known
    """

    chunks: Sequence[PlannedChunk]
    step: BegunStep
    part_seconds: float | None = None
    _num_turns: int = 0
    _num_noted: int = 0

    def advance(self, spare: float) -> int:
        """Launch about as many parts as ``spare`` seconds are enough for, at least one, or rest.

        Returns
        -------
        How many parts.
        """
        before = self.step.parts_left
        if spare == math.inf:
            self.step.advance(before)
            return before
        self._num_turns += 1
        if self._num_turns % REST_EVERY == 0:
            return 0
        part = math.inf if self.part_seconds is None else self.part_seconds
        begin = time.perf_counter()
        for _ in range(max(1, round(spare / part))):
            self.step.advance(1)
            if time.perf_counter() - begin + part > spare:
                break
        return before - self.step.parts_left

    def note(self, num_parts: int, seconds: float) -> float:
        """Take what so many parts took; returns what one takes as far as is known.

        The device may have waited for the first ones, and the last layer of a chunk that does not
        end its prompt computes little: what is known says more than such turns, unless they took
        longer.
        """
        self._num_noted += 1
        old, measured = self.part_seconds, max(seconds / num_parts, 1e-6)
        if old is None:
            known = measured
        elif self._num_noted == 1 or self.is_done:
            known = max(old, measured)
        else:
            known = (old + measured) / 2
        self.part_seconds = known
        return known

    @property
    def weight(self) -> int:
        """See ``PlannedChunk``."""
        return sum(chunk.weight for chunk in self.chunks)

    @property
    def is_done(self) -> bool:
        return not self.step.parts_left
