"""Where a prompt may be cut into chunks.

What is computed must not depend on what else is in the batch. Queries that see their whole past
may be computed in any chunks; those that share a selection may not, because the last of them
choose for all.
"""

from __future__ import annotations

from typing import NamedTuple

from tca_runtime.scheduler.request import Request
from tca_runtime.sparsity.settings import SparsitySettings


class Stretch(NamedTuple):
    """Prompt tokens up to ``end``, from which the next chunk is taken.

    A chunk ends at ``last_cut`` at most, or else takes them all. ``sees_past``: its queries see
    everything before them.
    """

    end: int
    last_cut: int
    sees_past: bool


def stretch_at(request: Request, begin: int, largest: int) -> Stretch:
    """What begins at a prompt's token ``begin``, where chunks have ``largest`` tokens at most.

    Selections begin at multiples of a quantum. A prompt's first tokens come before any of them, so
    they are cut at will; so are those of its tail, but for the last, which choose its decode view.
    """
    end = request.num_tokens
    if request.sparsity is None:
        return Stretch(end, end, True)
    settings = request.sparsity.settings
    quantum = min(settings.granularity, largest)
    first, tail = settings.first_selection(quantum), _tail(settings, end, quantum)
    if first <= begin < tail:
        stop = min(tail, begin - begin % quantum + quantum)
        if stop - begin < settings.num_prefill_probes:
            # Too few queries to choose, behind a cached prefix.
            return Stretch(stop, stop, True)
        return Stretch(stop, begin, False)
    if begin < first < tail:
        return Stretch(first, first, True)
    uncut = settings.probes if settings.num_candidates(end) else 0
    return Stretch(end, max(begin, end - uncut), True)


def _tail(settings: SparsitySettings, end: int, quantum: int) -> int:
    """Where a prompt's tail begins: before a run that has too few queries to choose for itself."""
    tail = end - max(settings.tail, settings.probes) if settings.tail else end
    into = tail % quantum
    return tail - into if into < settings.num_prefill_probes else tail
