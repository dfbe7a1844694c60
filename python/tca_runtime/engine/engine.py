"""One rank of the runtime: model, KV storage, attention and sampling on one device."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Many

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tca_runtime.attention.base import AttentionShape, AttentionStep, PrefillChunk
from tca_runtime.attention.registry import create_backend
from tca_runtime.cache.manager import CacheManager
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.cache.views import ViewTable
from tca_runtime.config import RuntimeConfig
from tca_runtime.engine.graphs import DecodeGraphs
from tca_runtime.engine.memory import ARENA_FACTOR, host_pool, host_slots, pool_tokens
from tca_runtime.engine.output import LaunchedStep, StartedStep
from tca_runtime.engine.sampler import Sampler
from tca_runtime.engine.step import ChunkInput, StepInput, StepOutput
from tca_runtime.engine.upload import upload, upload_ints
from tca_runtime.models.base import ForwardPass
from tca_runtime.models.loader import LoadedModel, load_model
from tca_runtime.sparsity.batched import BatchedSelection, covers
from tca_runtime.sparsity.chooser import ChunkSelection, DecodeView, StepSelection
from tca_runtime.sparsity.core import BudgetedCore, SharedCore
from tca_runtime.sparsity.load import load_settings
from tca_runtime.sparsity.recent_queries import RecentQueries
from tca_runtime.sparsity.refresh import Outdated, refresh
from tca_runtime.sparsity.settings import ModelIdentity, SparsitySettings

logger = logging.getLogger(__name__)


class Engine:
    """Runs forward passes. Knows sequences and tokens, but no requests and no policy.

    Attributes
    ----------
    cache : the slots of this device, to be planned by the scheduler
    sparsity : settings of selection, None for full attention
    model_config : sizes and special ids of the loaded model
    is_asynchronous : whether a launched step computes while the host goes on
    """

    def __init__(self, config: RuntimeConfig, loaded: LoadedModel | None = None) -> None:
        """``loaded``: a model in memory to share, instead of loading ``config.model``."""
        loaded = loaded or load_model(config.model)
        self.model = loaded.model
        self.model_config = loaded.config
        self.device = loaded.device
        self.shape = AttentionShape(
            num_layers=loaded.config.num_layers,
            num_q_heads=loaded.config.num_q_heads,
            num_kv_heads=loaded.config.num_kv_heads,
            head_dim=loaded.config.head_dim,
            dtype=loaded.dtype,
            device=loaded.device,
        )
        self.identity = ModelIdentity(
            fingerprint=loaded.model.fingerprint(),
            num_layers=self.shape.num_layers,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
        )
        self._max_batch = config.scheduler.max_running_requests
        self._graphs: DecodeGraphs | None = None
        self._queries: RecentQueries | None = None
        settings = load_settings(config.sparsity, self.identity, config.model.model_path)
        self._keep_queries(settings)
        num_host_slots = host_slots(config.sparsity, self.shape)
        tokens = pool_tokens(config.cache, self.shape, num_host_slots)
        pool = SlotPool(
            tokens * self.shape.rows + 1, self.shape.head_dim, self.shape.dtype, self.device
        )
        views = ViewTable(
            self._max_batch,
            self.shape.num_layers,
            self.shape.num_kv_heads,
            ARENA_FACTOR * pool.capacity,
            self.device,
        )
        self.cache = CacheManager(
            pool,
            views,
            not config.cache.disable_radix_cache,
            host=host_pool(num_host_slots, self.shape),
            may_prune=config.sparsity.tca_retention != "never",
        )
        self.backend = create_backend(config.attention.attention_backend, self.shape, pool.kv)
        self.backend.before_layer = self.cache.transfers.wait_for
        self.sampler = Sampler(loaded.config.vocab_size, self.device)
        self.is_asynchronous = self.device.type == "cuda"
        # The newest token of every row of the view table; padding reads the last one.
        self._token_buffer = torch.zeros(len(views.start), dtype=torch.int64, device=self.device)
        self.use_sparsity(settings)
        logger.info("KV pool: %d tokens, %d slots", tokens, pool.capacity)

    def use_sparsity(self, settings: SparsitySettings | None) -> None:
        """Select by other settings from now on; None for full attention.

        A scheduler reads them when it is made, so requests that run must have ended. Cached
        prefixes stay; who changes what a prefix's K and V depend on flushes the cache.
        """
        if self._keep_queries(settings) and self._graphs is not None:
            # They were captured without these queries.
            self.warm_up()
        self.sparsity = settings
        reclaimer, rows = self.cache.reclaimer, self.shape.rows
        reclaimer.choose_core = BudgetedCore(settings, rows) if settings else None
        reclaimer.choose_repeated = SharedCore(settings, rows) if settings else None

    def run(self, step: StepInput) -> StepOutput:
        """Compute one step: write K and V, sample the next tokens."""
        return self.launch(step).result()

    @torch.inference_mode()
    def launch(self, step: StepInput) -> LaunchedStep:
        """Queue one step, behind the steps launched before.

        On a GPU nothing here waits for the device, except where the host must read what was
        selected: ``max_dropped_mass``, other policies than TCA, prefixes that are pruned.
        """
        limit = self._graphs.max_batch if self._graphs is not None else 0
        if not step.chunks and 0 < len(step.decode) <= limit:
            hidden, places = self._replay(step)
            return self._launched(step, hidden, [], places)
        started = self._begin(step)
        started.advance(started.parts_left)
        return started.finish()

    @torch.inference_mode()
    def begin(self, step: StepInput) -> StartedStep:
        """Prepare a step whose parts are queued later, other steps between them.

        What it writes and reads must stay as it is until the step has ended.
        """
        part_tokens = None
        if len(step.chunks) == 1 and not step.decode:
            chunk = step.chunks[0]
            begin = chunk.sequence.computed - len(chunk.tokens)
            part_tokens = self.backend.part_tokens_at(begin)
        return self._begin(step, part_tokens)

    def _begin(self, step: StepInput, part_tokens: int | None = None) -> StartedStep:
        work = [self._selection(chunk) for chunk in step.chunks]
        selection = self._chooser(step, work) if any(work) else None
        forward = self._forward(step, selection, part_tokens)

        @torch.inference_mode()
        def finish() -> LaunchedStep:
            views = [selection.decode_view(i) if selection else None for i in range(len(work))]
            return self._launched(step, forward.hidden(), views, None)

        return StartedStep(forward, finish)

    def warm_up(self) -> None:
        """Compile and capture what would be at first use, so that no request waits for it."""
        if self.backend.batches_selections and self.device.type == "cuda":
            with torch.inference_mode():
                graphs = DecodeGraphs(
                    self.model,
                    self.backend,
                    self.cache.views,
                    self._token_buffer,
                    self._queries,
                    self._max_batch,
                )
                graphs.capture()
            self._graphs = graphs

    def _launched(
        self,
        step: StepInput,
        hidden: Tensor,
        chunk_views: Many[DecodeView | None],
        places: Tensor | None,
    ) -> LaunchedStep:
        views = [*self._refreshed(step), *chunk_views]
        return LaunchedStep(
            self.model, self.sampler, step, hidden, views, self._token_buffer, places
        )

    def _refreshed(self, step: StepInput) -> list[DecodeView | None]:
        """The new views of the decode requests that want one."""
        views: list[DecodeView | None] = [None] * len(step.decode)
        places: list[int] = []
        outdated: list[Outdated] = []
        for place, decode in enumerate(step.decode):
            if decode.refresh is not None:
                places.append(place)
                parts = self.cache.parts(decode.sequence)
                outdated.append(Outdated(decode.refresh, parts, decode.sequence.view.index))
        if outdated and self._queries is not None:
            batched = self.backend.batches_selections
            found = refresh(outdated, self._queries, self.shape, self.cache.pool, batched)
            for place, view in zip(places, found, strict=True):
                views[place] = view
        return views

    def _keep_queries(self, settings: SparsitySettings | None) -> bool:
        """Make room for the queries that refreshes score with; whether it was missing."""
        depth = settings.refresh_probes if settings is not None else 0
        if depth <= (self._queries.depth if self._queries is not None else 0):
            return False
        # One row for the padding of captured graphs.
        self._queries = RecentQueries(self._max_batch + 1, depth, self.shape)
        return True

    def _replay(self, step: StepInput) -> tuple[Tensor, Tensor]:
        assert self._graphs is not None
        sequences = [d.sequence for d in step.decode]
        replayed = self._graphs.run(
            [s.computed for s in sequences], [s.view.index for s in sequences]
        )
        self.cache.note_step(sequences)
        return replayed

    def _chooser(
        self, step: StepInput, work: Many[ChunkSelection | None]
    ) -> StepSelection | BatchedSelection:
        if not self.backend.batches_selections or not covers(work):
            return StepSelection(self.shape, self.cache.pool, work)
        sizes = [len(step.decode), *(len(chunk.tokens) for chunk in step.chunks)]
        starts = np.cumsum(sizes).tolist()
        return BatchedSelection(self.shape, self.cache.pool, work, starts)

    def _selection(self, chunk: ChunkInput) -> ChunkSelection | None:
        if chunk.sparsity is None:
            return None
        parts = self.cache.parts(chunk.sequence)
        return ChunkSelection.plan(
            chunk.sparsity, parts, len(chunk.tokens), chunk.ends_prompt, chunk.sees_past
        )

    def _forward(
        self,
        step: StepInput,
        selection: StepSelection | BatchedSelection | None,
        part_tokens: int | None,
    ) -> ForwardPass:
        num_decode = len(step.decode)
        indices = self._indices([d.sequence.view.index for d in step.decode])
        ids: list[NDArray[np.int64]] = []
        positions = [np.array([d.sequence.computed for d in step.decode], dtype=np.int64)]
        chunks: list[PrefillChunk] = []
        token_start = num_decode
        for index, chunk in enumerate(step.chunks):
            size = len(chunk.tokens)
            begin = chunk.sequence.computed - size
            ids.append(chunk.tokens.astype(np.int64))
            positions.append(np.arange(begin, begin + size))
            view = chunk.sequence.view
            lengths = (view.lengths + view.grown).reshape(self.shape.num_layers, -1)
            chunks.append(
                PrefillChunk(token_start, size, begin, index, view.uniform_length, lengths)
            )
            token_start += size
        tokens = self._token_buffer[indices]
        if ids:
            tokens = torch.cat([tokens, self._upload(np.concatenate(ids))])
        attention = self.backend.begin(self._attention_step(step, indices, chunks, selection))
        if isinstance(selection, BatchedSelection):
            attention = selection.watching(attention)
        where, wanted = self._upload(np.concatenate(positions)), _wanted(step)
        if num_decode and self._queries is not None:
            attention = self._queries.recording(attention, indices, where[:num_decode])
        rows = None if wanted is None else self._indices(wanted)
        return self.model.begin(tokens, where, attention, part_tokens, rows)

    def _attention_step(
        self,
        step: StepInput,
        indices: Tensor,
        chunks: Many[PrefillChunk],
        selection: StepSelection | BatchedSelection | None,
    ) -> AttentionStep:
        views = self.cache.views
        decode = prefill = None
        batched = selection if isinstance(selection, BatchedSelection) else None
        new_slots: list[Tensor] = []
        if step.decode:
            self.cache.step([d.sequence for d in step.decode], indices)
            decode = views.lists(indices)
            new_slots.append(views.last_slots(decode).transpose(0, 1))
        if step.chunks:
            prefill = views.lists(self._indices([c.sequence.view.index for c in step.chunks]))
            heads = (self.shape.num_layers, self.shape.num_kv_heads, -1)
            new_slots += [c.slots.view(heads).transpose(1, 2) for c in step.chunks]
        return AttentionStep(
            num_decode=len(step.decode),
            decode=decode,
            chunks=chunks,
            prefill=prefill,
            new_slots=torch.cat(new_slots, dim=1),
            choose_view=selection if isinstance(selection, StepSelection) else None,
            choose_views=batched if batched is not None and batched.chunks else None,
        )

    def _indices(self, indices: list[int]) -> Tensor:
        return upload_ints(indices, self.device)

    def _upload(self, array: NDArray[np.int64]) -> Tensor:
        return upload(torch.from_numpy(array), self.device)


def _wanted(step: StepInput) -> list[int] | None:
    """Places on the step's token axis whose hidden states are used, in order; None for all."""
    if any(c.prompt_targets is not None and c.logprobs is not None for c in step.chunks):
        return None
    places = step.sampling_places
    if not places and any(c.ends_prompt for c in step.chunks):
        # The last layer chooses for the decode view too.
        return None
    num_tokens = len(step.decode) + sum(len(chunk.tokens) for chunk in step.chunks)
    return places if len(places) < num_tokens else None
