"""Next-token distributions of given tokens under any view of a prompt, in this process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tca_runtime.attention.base import AttentionStep, HeadLists, PrefillChunk, ViewChooser
from tca_runtime.cache.radix_tree import Namespace, Tokens
from tca_runtime.cache.sequence import Sequence
from tca_runtime.config import CacheArgs, ModelArgs, RuntimeConfig, SchedulerArgs, SparsityArgs
from tca_runtime.engine.engine import Engine
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.chooser import (
    ChunkSelection,
    DecodeView,
    RequestSparsity,
    StepSelection,
)
from tca_runtime.sparsity.settings import SparsitySettings

NAMESPACE = Namespace()


class FixedView:
    """The ``ViewChooser`` of tokens that are generated after a decode view was chosen."""

    def __init__(self, view: DecodeView, num_kv_heads: int) -> None:
        self._view = view
        self._heads = num_kv_heads
        self._ends = view.lengths.cumsum()

    def __call__(self, layer: int, chunk: int, q: Tensor) -> HeadLists:
        rows = slice(layer * self._heads, (layer + 1) * self._heads)
        lengths = self._view.lengths[rows]
        end = int(self._ends[rows.stop - 1])
        return HeadLists(self._view.slots[end - int(lengths.sum()) : end], lengths)


@dataclass(eq=False)
class Prompt:
    """A computed prompt.

    Attributes
    ----------
    next_token : log-probabilities after its last token, ``[1, vocab]``
    selection, work : of its last chunk; ``work`` is None when nothing can be dropped
    slots : of the tokens that follow, shared by all continuations
    """

    sequence: Sequence
    num_tokens: int
    next_token: Tensor
    selection: StepSelection
    work: ChunkSelection | None
    slots: Tensor

    def decode_view(self, budget: BudgetTable) -> DecodeView | None:
        """What the prompt's last queries keep within ``budget``; None for everything."""
        if self.work is None:
            return None
        self.work.request = RequestSparsity(replace(self.work.request.settings, decode=budget))
        return self.selection.decode_view(0)


class TeacherForcing:
    """A model, and prompts whose continuations are judged."""

    def __init__(self, model: ModelArgs, max_tokens: int) -> None:
        """``max_tokens``: of a prompt and its continuation."""
        self.engine = Engine(
            RuntimeConfig(
                model=model,
                cache=CacheArgs(max_total_tokens=max_tokens, disable_radix_cache=True),
                scheduler=SchedulerArgs(max_running_requests=1),
                sparsity=SparsityArgs(disable_tca=True, host_cache_size=0),
            )
        )

    @torch.inference_mode()
    def prefill(self, tokens: Tokens, room: int, settings: SparsitySettings) -> Prompt:
        """Compute a prompt in chunks of the settings' granularity.

        ``room`` : tokens of the continuations. ``release`` it before the next prompt.
        """
        cache = self.engine.cache
        sequence = cache.begin(cache.match(NAMESPACE, tokens[:0]), len(tokens) + room)
        assert sequence is not None
        for begin in range(0, len(tokens), settings.granularity):
            chunk = tokens[begin : begin + settings.granularity]
            slots = cache.extend(sequence, len(chunk))
            last = begin + len(chunk) == len(tokens)
            parts = cache.parts(sequence)
            work = ChunkSelection.plan(RequestSparsity(settings), parts, len(chunk), last)
            selection = StepSelection(self.engine.shape, cache.pool, [work])
            hidden = self._forward(sequence, slots, chunk, begin, selection)
        return Prompt(
            sequence,
            len(tokens),
            self.engine.model.logits(hidden[-1:]).log_softmax(-1),
            selection,
            work,
            cache.extend(sequence, room),
        )

    @torch.inference_mode()
    def log_probs(self, prompt: Prompt, tokens: Tokens, view: DecodeView | None) -> Tensor:
        """Log-probabilities after each of ``tokens``, which follow the prompt: ``[n, vocab]``.

        ``view`` : what they see of the prompt, None for all of it. ``n`` is the prompt's room.
        """
        choose = None if view is None else FixedView(view, self.engine.shape.num_kv_heads)
        hidden = self._forward(prompt.sequence, prompt.slots, tokens, prompt.num_tokens, choose)
        return self.engine.model.logits(hidden).log_softmax(-1)

    def release(self, prompt: Prompt) -> None:
        self.engine.cache.release(NAMESPACE, prompt.sequence, np.empty(0, np.int32))

    def _forward(
        self,
        sequence: Sequence,
        slots: Tensor,
        tokens: Tokens,
        begin: int,
        choose: ViewChooser | None,
    ) -> Tensor:
        engine, shape = self.engine, self.engine.shape
        index = torch.tensor([sequence.view.index], device=shape.device)
        step = AttentionStep(
            num_decode=0,
            decode=None,
            chunks=[PrefillChunk(0, len(tokens), begin, 0, sequence.view.uniform_length)],
            prefill=engine.cache.views.lists(index),
            new_slots=slots.view(shape.num_layers, shape.num_kv_heads, -1).transpose(1, 2),
            choose_view=choose,
        )
        ids = torch.from_numpy(tokens.astype(np.int64)).to(shape.device)
        positions = torch.arange(begin, begin + len(tokens), device=shape.device)
        return engine.model.forward(ids, positions, engine.backend.begin(step))
