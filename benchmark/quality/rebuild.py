"""Scores of a cached context that depend on no question: the model repeats it (KVzip's idea).

After arXiv 2505.23416: what the model attends to while it writes the context again is what it
needs to answer whatever is asked about it. The attention raises the slots' accumulated importance,
by which prefixes shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tca_runtime.cache.radix_tree import Namespace
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.step import ChunkInput, StepInput
from tca_runtime.sparsity.chooser import RequestSparsity


def rebuild(engine: Engine, context: Sequence[int], ask: Sequence[int], piece: int) -> None:
    """Let the cached ``context`` be read by its own repetition, after the tokens ``ask``.

    ``piece`` tokens are repeated per pass. Importance is a mean over them, and the best of all
    passes stays. Nothing else of it stays in the cache.
    """
    settings = engine.sparsity
    assert settings is not None
    cache, namespace = engine.cache, Namespace(f"\0{settings.fingerprint}", prunable=True)
    for begin in range(0, len(context), piece):
        repeated = context[begin : begin + piece]
        tokens = np.asarray([*context, *ask, *repeated], dtype=np.int32)
        match = cache.match(namespace, tokens[: len(context)])
        missing = len(tokens) - match.num_tokens
        sequence = cache.begin(match, missing)
        assert sequence is not None
        chunk = ChunkInput(
            sequence,
            tokens[match.num_tokens :],
            cache.extend(sequence, missing),
            sparsity=RequestSparsity(replace(settings, probes=len(repeated))),
            ends_prompt=True,
        )
        engine.run(StepInput([], [chunk]))
        cache.release(namespace, sequence, tokens[: match.num_tokens])
