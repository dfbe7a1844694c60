"""Turns logits into tokens: one draw per row, under each request's own settings."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_kernels.sample import gumbel_argmax, keep_top_p
from tca_runtime.engine.filters import TOP_P_OFF, keep_min_p, keep_top_k_top_p
from tca_runtime.engine.grammar import GrammarMatcher, allowed_tokens, forbid_others
from tca_runtime.engine.noise import noise_keys
from tca_runtime.engine.penalties import TokenCounts
from tca_runtime.engine.upload import upload, upload_floats, upload_ints
from tca_runtime.sampling_params import SamplingParams

# Far below any logit yet finite: a token forbidden this way is still drawn when a grammar
# leaves no other.
_FORBIDDEN = -1e30
# Practically uniform; an infinite temperature would make NaN of logits at -inf.
_MAX_TEMPERATURE = 1e6


class RowSampling:
    """How one request draws its tokens: settings, and the state that grows with its output.

    Built once per request. The sampler keeps device state for as long as this object lives.

    Attributes
    ----------
    matcher : the request's grammar, if it has one; set before its first draw
    num_drawn : tokens drawn so far; the host may not know the last ones yet
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt_ids: NDArray[np.int32],
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        """``eos_ids`` are forbidden until ``params.min_new_tokens``, like the stop token ids."""
        self.params = params
        self.seed = seed % 2**64
        self.prompt_ids = prompt_ids
        self.stop_ids = sorted(eos_ids.union(params.stop_token_ids))
        self.matcher: GrammarMatcher | None = None
        self.num_drawn = 0

    @property
    def position(self) -> int:
        """Absolute position of the next token."""
        return len(self.prompt_ids) + self.num_drawn

    @property
    def is_penalised(self) -> bool:
        p = self.params
        return (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) != (1.0, 0.0, 0.0)

    def accept(self, token: int) -> None:
        """Let the grammar follow the token that was drawn; must precede the next draw.

        Raises
        ------
        GrammarError
            When the grammar does not allow it, as happens where a grammar allows no token at all.
        """
        if self.matcher is not None:
            self.matcher.accept(token)


@dataclass(frozen=True)
class _Bias:
    """Additions to single logits."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Minimum:
    """Tokens that rows must not draw before the position ``until``."""

    rows: Tensor
    tokens: Tensor
    until: Tensor


@dataclass(frozen=True)
class _Penalties:
    """Penalised rows: their places in the batch and in the table of counts, and the settings."""

    index: Tensor
    counts: Tensor
    settings: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Filter:
    """One of the filters, and the rows among the drawing ones that it concerns (None: all)."""

    index: Tensor | None
    keep: Callable[[Tensor], None]


@dataclass(frozen=True)
class _Draws:
    """The rows that draw at random, and how their choice is narrowed first.

    ``index``: their places in the batch, None when it is all of them.
    """

    rows: list[RowSampling]
    index: Tensor | None
    seeds: NDArray[np.uint64]
    temperature: Tensor
    filters: list[_Filter]

    def draw(self, logits: Tensor) -> Tensor:
        scores = _take(logits, self.index) / self.temperature
        for filter in self.filters:
            part = _take(scores, filter.index)
            filter.keep(part)
            if filter.index is not None:
                scores[filter.index] = part
        positions = np.array([row.position for row in self.rows], dtype=np.uint64)
        keys = torch.from_numpy(noise_keys(self.seeds, positions))
        return gumbel_argmax(scores, upload(keys, logits.device))


@dataclass(frozen=True)
class SamplingBatch:
    """What a batch needs on the device, valid as long as it is made of the same rows.

    Parts that no row needs are None: a batch of plain greedy rows has none.
    """

    rows: tuple[RowSampling, ...]
    matchers: tuple[GrammarMatcher | None, ...]
    penalties: _Penalties | None
    bias: _Bias | None
    minimum: _Minimum | None
    draws: _Draws | None

    @property
    def edits_logits(self) -> bool:
        """Whether anything but temperature and filters stands between logits and draw."""
        parts = (self.penalties, self.bias, self.minimum)
        return any(self.matchers) or any(part is not None for part in parts)


class Sampler:
    """Draws tokens. Holds the device state of penalised requests and the last batch's tensors.

    Nothing here waits for the device.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._counts = TokenCounts(vocab_size, device)
        self._count_rows: weakref.WeakKeyDictionary[RowSampling, int] = weakref.WeakKeyDictionary()
        self._batch: SamplingBatch | None = None

    @property
    def num_count_rows(self) -> int:
        """Requests whose tokens are being counted."""
        return self._counts.num_rows

    def sample(self, logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
        """Draw the next token of each row, and advance the rows by it.

        The draw is a function of the row's logits, settings, seed and position alone. Order:
        grammar, penalties, logit bias, minimum length, temperature, top-k, top-p, min-p.

        Parameters
        ----------
        logits : float32 ``[B, V]``, not modified

        Returns
        -------
        int64 ``[B]`` on the device
        """
        batch = self.batch(rows)
        if batch.edits_logits:
            logits = self._edited(logits, batch)
        tokens = self._draw(logits, batch.draws)
        if batch.penalties is not None:
            self._counts.record(batch.penalties.counts, tokens[batch.penalties.index])
        for row in rows:
            row.num_drawn += 1
        return tokens

    def batch(self, rows: Sequence[RowSampling]) -> SamplingBatch:
        """The batch's static part; built anew only when its rows change."""
        if self._batch is None or self._batch.rows != tuple(rows):
            self._batch = SamplingBatch(
                rows=tuple(rows),
                matchers=tuple(row.matcher for row in rows),
                penalties=self._penalties(rows),
                bias=self._bias(rows),
                minimum=self._minimum(rows),
                draws=self._draws(rows),
            )
        return self._batch

    def _edited(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        logits = logits.clone()
        if any(batch.matchers):
            allowed = allowed_tokens(batch.matchers, self._vocab_size)
            forbid_others(logits, upload(allowed, self._device))
        if batch.penalties is not None:
            p = batch.penalties
            part = logits[p.index]
            self._counts.penalise(part, p.counts, *p.settings)
            logits[p.index] = part
        if batch.bias is not None:
            logits[batch.bias.rows, batch.bias.tokens] += batch.bias.values
        if batch.minimum is not None:
            m = batch.minimum
            positions = self._ints([row.position for row in batch.rows])
            early = positions[m.rows] < m.until
            logits[m.rows, m.tokens] += torch.where(early, _FORBIDDEN, 0.0)
        return logits

    @staticmethod
    def _draw(logits: Tensor, draws: _Draws | None) -> Tensor:
        if draws is None:
            return logits.argmax(-1)
        drawn = draws.draw(logits)
        if draws.index is None:
            return drawn
        tokens = logits.argmax(-1)
        tokens[draws.index] = drawn
        return tokens

    def _penalties(self, rows: Sequence[RowSampling]) -> _Penalties | None:
        chosen = [i for i, row in enumerate(rows) if row.is_penalised]
        if not chosen:
            return None
        params = [rows[i].params for i in chosen]
        return _Penalties(
            index=self._ints(chosen),
            counts=self._ints([self._count_row(rows[i]) for i in chosen]),
            settings=(
                self._column([p.repetition_penalty for p in params]),
                self._column([p.frequency_penalty for p in params]),
                self._column([p.presence_penalty for p in params]),
            ),
        )

    def _count_row(self, row: RowSampling) -> int:
        index = self._count_rows.get(row)
        if index is None:
            prompt = torch.from_numpy(np.asarray(row.prompt_ids, dtype=np.int64))
            index = self._count_rows[row] = self._counts.open(prompt)
            weakref.finalize(row, self._counts.close, index)
        return index

    def _bias(self, rows: Sequence[RowSampling]) -> _Bias | None:
        entries = [
            (i, token, max(_FORBIDDEN, min(-_FORBIDDEN, value)))
            for i, row in enumerate(rows)
            for token, value in row.params.logit_bias.items()
        ]
        if not entries:
            return None
        indices, tokens, values = zip(*entries, strict=True)
        return _Bias(self._ints(indices), self._ints(tokens), upload_floats(values, self._device))

    def _minimum(self, rows: Sequence[RowSampling]) -> _Minimum | None:
        entries = [
            (i, token, len(row.prompt_ids) + row.params.min_new_tokens)
            for i, row in enumerate(rows)
            if row.num_drawn < row.params.min_new_tokens
            for token in row.stop_ids
        ]
        if not entries:
            return None
        indices, tokens, until = zip(*entries, strict=True)
        return _Minimum(self._ints(indices), self._ints(tokens), self._ints(until))

    def _draws(self, rows: Sequence[RowSampling]) -> _Draws | None:
        chosen = [i for i, row in enumerate(rows) if not row.params.is_greedy]
        if not chosen:
            return None
        drawing = [rows[i] for i in chosen]
        params = [row.params for row in drawing]
        return _Draws(
            rows=drawing,
            index=self._index(chosen, len(rows)),
            seeds=np.array([row.seed for row in drawing], dtype=np.uint64),
            temperature=self._column([min(p.temperature, _MAX_TEMPERATURE) for p in params]),
            filters=self._filters(params),
        )

    def _filters(self, params: Sequence[SamplingParams]) -> list[_Filter]:
        size = self._vocab_size
        ks = [s.top_k if 0 < s.top_k < size else size for s in params]
        ps = [s.top_p if s.top_p < 1 else TOP_P_OFF for s in params]
        ranked = [i for i, k in enumerate(ks) if k < size]
        nucleus = [i for i, k in enumerate(ks) if k == size and ps[i] < 1]
        filters: list[_Filter] = []
        if ranked:
            k = self._ints([ks[i] for i in ranked])[:, None]
            p = self._column([ps[i] for i in ranked])
            keep = partial(keep_top_k_top_p, k=k, p=p, k_max=max(ks[i] for i in ranked))
            filters.append(_Filter(self._index(ranked, len(params)), keep))
        if nucleus:
            keep = partial(keep_top_p, p=self._column([ps[i] for i in nucleus]))
            filters.append(_Filter(self._index(nucleus, len(params)), keep))
        floored = [i for i, settings in enumerate(params) if settings.min_p > 0]
        if floored:
            keep = partial(keep_min_p, p=self._column([params[i].min_p for i in floored]))
            filters.append(_Filter(self._index(floored, len(params)), keep))
        return filters

    def _index(self, chosen: Sequence[int], total: int) -> Tensor | None:
        return None if len(chosen) == total else self._ints(chosen)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return upload_ints(values, self._device)

    def _column(self, values: Sequence[float]) -> Tensor:
        return upload_floats(values, self._device)[:, None]


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]
