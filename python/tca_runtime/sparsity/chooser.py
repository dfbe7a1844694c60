"""Selection during a forward pass: prefill views layer by layer, the decode view at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tca_runtime.attention.base import AttentionShape, HeadLists
from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.layout import Layout
from tca_runtime.sparsity.policies import Candidates
from tca_runtime.sparsity.selection import LayerScores, select
from tca_runtime.sparsity.settings import BLOCK_SIZE, SparsitySettings

# What of a client's ``custom_params`` is read here.
REQUEST_PARAMS = ("tca", "kept_ratio", "max_dropped_mass", "min_confidence", "probes")
# What decode views keep until a request with ``min_confidence`` is not sure. From a fifth on, most
# answers are those of full attention (docs/quality.md).
LITTLE = 0.2

# Ratios tried in turn for a request that limits the dropped mass instead of the memory.
LADDER = (0.05, 0.1, 0.15, 0.2, 0.25, 0.32, 0.39, 0.5, 0.65, 0.8, 1.0)


def rungs(block: int) -> list[float]:
    """The ladder's ratios that blocks of this size can reach."""
    return [ratio for ratio in LADDER if ratio >= 1 / block]


@dataclass(frozen=True, eq=False)
class RequestSparsity:
    """Settings of one request: the server's, changed by what the client asked for.

    Attributes
    ----------
    max_dropped_mass : overrides the decode budget: the smallest rung of the ladder is taken whose
        mean dropped mass does not exceed it
    min_confidence, more : a token that is drawn with less probability is drawn again with the
        settings ``more``, and so are those that follow
    """

    settings: SparsitySettings
    max_dropped_mass: float | None = None
    min_confidence: float | None = None
    more: SparsitySettings | None = None

    @property
    def largest(self) -> SparsitySettings:
        """Those with which most is kept."""
        return self.settings if self.more is None else self.more

    def raised(self) -> RequestSparsity:
        """Of a request that was not sure, or that must not begin with little."""
        return self if self.more is None else RequestSparsity(self.more)


@dataclass(eq=False)
class ChunkSelection:
    """Selection work of one prefill chunk.

    Attributes
    ----------
    lists : everything that exists of the request, the chunk's tokens included
    num_tokens : length of the chunk
    prefill : candidates for the chunk's own view, None when its first query sees its whole past
    sees_past : whether all its queries do; then nothing is chosen for them
    decode : candidates for the decode view, on a prompt's last chunk
    """

    request: RequestSparsity
    lists: HeadSlots
    num_tokens: int
    prefill: Layout | None
    decode: Layout | None
    sees_past: bool = False
    scored: list[tuple[Candidates, Tensor]] = field(default_factory=list)

    @staticmethod
    def plan(
        request: RequestSparsity,
        parts: Sequence[HeadSlots],
        num_tokens: int,
        is_last: bool,
        sees_past: bool = False,
    ) -> ChunkSelection | None:
        """None when nothing is long enough to be dropped."""
        settings = request.settings
        sees_past = sees_past or settings.one_shot
        lists = HeadSlots.concat(parts)
        layouts: list[Layout | None] = []
        for past, wanted in ((lists.end - num_tokens, not sees_past), (lists.end, is_last)):
            layout = None
            if wanted and (limit := settings.num_candidates(past)):
                layout = Layout.of(parts, limit, settings.block)
            layouts.append(layout if layout is not None and layout.num_candidates else None)
        if layouts == [None, None]:
            return None
        return ChunkSelection(request, lists, num_tokens, layouts[0], layouts[1], sees_past)


@dataclass(frozen=True, eq=False)
class DecodeView:
    """The lists a request decodes with.

    Attributes
    ----------
    lengths : int64 ``[rows]``
    slots : int32 ``[sum(lengths)]``
    num_tokens : those that were selected from
    dropped_mass : scalar on the device, the mean over rows of the attention mass not kept
    report : what else clients are told
    """

    lengths: np.ndarray[Any, np.dtype[np.int64]]
    slots: Tensor
    num_tokens: int
    dropped_mass: Tensor
    report: dict[str, Any]


class StepSelection:
    """The ``ViewChooser`` of one forward pass."""

    def __init__(
        self, shape: AttentionShape, pool: SlotPool, chunks: Sequence[ChunkSelection | None]
    ) -> None:
        self._shape = shape
        self._pool = pool
        self._chunks = chunks

    def __call__(self, layer: int, chunk: int, q: Tensor) -> HeadLists | None:
        """Choose a chunk's view; on a last chunk, remember the scores for the decode view."""
        work = self._chunks[chunk]
        if work is None:
            return None
        settings = work.request.settings
        rows = self._rows(layer)
        num_probes = settings.num_prefill_probes if work.decode is None else settings.probes
        scores = self._score(work, rows, q[-num_probes:])
        if work.decode is not None:
            index = scores.index(work.decode, rows)
            candidates = self._candidates(scores, index, settings.block)
            best = self._pool.importance[candidates.slots]
            new = candidates.importance.to(best.dtype)
            self._pool.importance[candidates.slots] = torch.maximum(best, new)
            work.scored.append((candidates, index))
        if work.prefill is None:
            return None
        if num_probes != settings.num_prefill_probes:
            scores = self._score(work, rows, q[-settings.num_prefill_probes :])
        index = scores.index(work.prefill, rows)
        candidates = self._candidates(scores, index, settings.block)
        return select(
            settings.policy,
            candidates,
            index,
            scores.lists,
            settings.prefill,
            rows,
            without_last=work.num_tokens,
        ).lists

    def decode_view(self, chunk: int) -> DecodeView | None:
        """After the pass: the view that a prompt's last chunk chose, None to see everything."""
        work = self._chunks[chunk]
        if work is None or work.decode is None:
            return None
        limit = work.request.max_dropped_mass
        decode = work.request.settings.decode
        if limit is None:
            return self._view(work, decode)
        for ratio in rungs(decode.block):
            view = self._view(work, decode.at_ratio(ratio))
            if float(view.dropped_mass) <= limit:
                break
        return view

    def _view(self, work: ChunkSelection, budget: BudgetTable) -> DecodeView:
        policy = work.request.settings.policy
        chosen = []
        for layer, (candidates, index) in enumerate(work.scored):
            rows = self._rows(layer)
            lists = layer_lists(work.lists, rows)
            chosen.append(select(policy, candidates, index, lists, budget, rows))
        lengths = np.concatenate([c.lists.lengths for c in chosen])
        slots = torch.cat([c.lists.slots for c in chosen])
        return DecodeView(
            lengths=lengths,
            slots=slots,
            num_tokens=work.lists.end,
            dropped_mass=torch.cat([c.dropped_mass for c in chosen]).mean(),
            report={
                "kept_ratio": len(slots) / work.lists.num_slots,
                "probes": work.scored[0][0].probes.shape[0],
            },
        )

    def _score(self, work: ChunkSelection, rows: slice, probes: Tensor) -> LayerScores:
        lists = layer_lists(work.lists, rows)
        return LayerScores.measure(probes, self._pool.kv, lists, self._shape.scale)

    def _candidates(self, scores: LayerScores, index: Tensor, block: int) -> Candidates:
        return scores.candidates(index, self._pool.kv, block, self._shape.scale)

    def _rows(self, layer: int) -> slice:
        heads = self._shape.num_kv_heads
        return slice(layer * heads, (layer + 1) * heads)


def layer_lists(lists: HeadSlots, rows: slice) -> HeadLists:
    """The lists of one layer."""
    indptr = lists.indptr
    return HeadLists(lists.slots[indptr[rows.start] : indptr[rows.stop]], lists.lengths[rows])


def request_sparsity(
    server: SparsitySettings | None, custom_params: dict[str, Any]
) -> RequestSparsity | None:
    """Apply a client's ``custom_params`` (``REQUEST_PARAMS``) to the server's settings; None for
    full attention.

    Raises
    ------
    ValueError
        For a value of the wrong type or out of range, naming it; also where full attention makes
        it meaningless, so that whether a request is accepted does not depend on the server's flags.
    """
    block = BLOCK_SIZE if server is None else server.block
    wanted = custom_params.get("tca")
    if not isinstance(wanted, bool | None):
        raise ValueError("custom_params.tca must be true or false")
    ratio = _number(custom_params, "kept_ratio", 1 / block, 1.0)
    mass = _number(custom_params, "max_dropped_mass", 0.0, 1.0)
    confidence = _number(custom_params, "min_confidence", 0.0, 1.0)
    if confidence is not None and mass is not None:
        raise ValueError("custom_params.min_confidence and max_dropped_mass exclude each other")
    probes = _number(custom_params, "probes", 1, 1024)
    if probes is not None and probes != int(probes):
        raise ValueError(f"custom_params.probes must be a whole number, got {probes:g}")
    if server is None or wanted is False or ratio == 1.0:
        return None
    settings = server
    if ratio is not None:
        settings = replace(
            settings,
            prefill=settings.prefill.at_ratio(ratio),
            decode=settings.decode.at_ratio(ratio),
        )
    if probes is not None:
        settings = replace(settings, probes=int(probes))
    if confidence is None and mass is None:
        confidence = settings.min_confidence
    if not confidence or settings.decode.average() <= LITTLE:
        return RequestSparsity(settings, mass)
    little = replace(settings, decode=settings.decode.at_ratio(LITTLE))
    return RequestSparsity(little, min_confidence=confidence, more=settings)


def _number(params: dict[str, Any], name: str, low: float, high: float) -> float | None:
    value = params.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"custom_params.{name} must be a number in [{low:g}, {high:g}]")
    return float(value)
