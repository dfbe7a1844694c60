"""Requests that a server makes up and answers itself before it is ready."""

from __future__ import annotations

import logging
import time

import numpy as np

from tca_runtime.config import RuntimeConfig
from tca_runtime.engine.engine import Engine
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.in_memory import in_memory_scheduler

logger = logging.getLogger(__name__)

# Tokens of a prompt that follows a known one, and of one from which nothing is selected.
SHORT = 70
# Generated: beyond the first refresh.
OUTPUT = 4


def rehearse(config: RuntimeConfig, engine: Engine, context_length: int) -> int:
    """Compile the kernels that requests take, so that no client waits for that.

    A long prompt goes through chunks, selections, a tail and a refresh; then two that begin with it
    and a short one, at once. Nothing of them stays in the cache.

    Returns
    -------
    The length of the long prompt: as much as its chunks need, less where memory is small; 0 if
    there is too little for any.
    """
    settings, device = engine.sparsity, engine.device.type
    refresh = settings.first_refresh if settings is not None else 0
    wanted = config.scheduler.chunk_on(device) + (settings.granularity if settings else 0) + SHORT
    room = min(engine.cache.capacity_tokens // 3, context_length) - 2 * SHORT - refresh - OUTPUT
    length = min(wanted, room)
    if length < SHORT:
        return 0
    begin = time.perf_counter()
    scheduler, inbox, outbox = in_memory_scheduler(config, engine, context_length)
    count = refresh + OUTPUT
    greedy = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(max_new_tokens=count, temperature=0.8, top_p=0.9, ignore_eos=True)
    dice = np.random.default_rng(0)
    vocab = engine.model_config.vocab_size
    long, other, more = (dice.integers(0, vocab, n).tolist() for n in (length, SHORT, SHORT))
    for prompts in ([long], [long + more, long + other, other]):
        for i, prompt in enumerate(prompts):
            inbox.submit(f"rehearsal-{i}", prompt, drawn if i else greedy)
        while sum(output.finish is not None for output in outbox.outputs) < len(prompts):
            scheduler.run_once()
        outbox.outputs.clear()
    # What a step in flight still draws for requests that have ended.
    while not scheduler.planner.is_idle:
        scheduler.run_once()
    engine.cache.reset()
    seconds = time.perf_counter() - begin
    logger.info("rehearsed with a prompt of %d tokens in %.1f s", length, seconds)
    return length
