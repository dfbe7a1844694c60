"""Repeating cached prefixes in idle time, so that what is pruned later depends on no question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tca_runtime.cache.radix_tree import Namespace, RadixNode, Tokens
from tca_runtime.config import SparsityArgs
from tca_runtime.engine.step import ChunkInput, StepInput
from tca_runtime.sparsity.chooser import RequestSparsity
from tca_runtime.sparsity.settings import SparsitySettings

if TYPE_CHECKING:
    from tca_runtime.engine.engine import Engine

# What stands between a prefix and its repetition, whatever the prefix ends with.
PROMPT = "\n\nRepeat the text above, word for word.\n\n"
# Tokens repeated per pass: importance is a mean over them, and a request that comes meanwhile
# waits for one pass.
PIECE = {"cuda": 256, "cpu": 64}


@dataclass
class _Prefix:
    """A cached prefix being repeated; ``begin`` is the next token's position."""

    node: RadixNode
    namespace: Namespace
    tokens: Tokens
    begin: int


class Repetition:
    """Has the model repeat cold prefixes piece by piece, oldest first.

    What it attends to while it writes a text again is what it needs to answer whatever is asked
    about it (KVzip, arXiv 2505.23416). The attention raises the importance of the slots, by which
    prefixes shrink; heads may compete for places then (``SharedCore``), because importance from
    repetition, unlike that from one question, compares between heads.

    A pass is a short prompt behind the prefix, of which nothing stays. It never takes slots that
    something else would have to give up, and does not make a prefix count as used.

    Parameters
    ----------
    prompt : token ids between a prefix and its repetition
    context_length : prefixes that leave no room for a pass are not repeated
    piece : tokens per pass; by device if absent
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        context_length: int,
        piece: int | None = None,
    ) -> None:
        self._engine = engine
        self._prompt = prompt
        self._context_length = context_length
        self._piece = piece or PIECE[engine.device.type]
        self._current: _Prefix | None = None
        self.num_passes = 0

    def advance(self) -> bool:
        """Repeat one piece, if there is a prefix and room for it; whether one was repeated."""
        prefix = self._current or self._next()
        self._current = prefix
        if prefix is None:
            return False
        done = self._repeat(prefix)
        if done is None:
            self._current = None
            return False
        self.num_passes += 1
        prefix.begin += done
        if prefix.begin == len(prefix.tokens):
            self._finish(prefix)
        return True

    def _next(self) -> _Prefix | None:
        """The oldest complete prefix that nothing of which was dropped, long enough to shrink."""
        settings, tree = self._engine.sparsity, self._engine.cache.tree
        while settings is not None and (node := tree.unrepeated.pop()):
            path = tree.path_to(node)
            end = node.slots.end
            fits = end + len(self._prompt) + self._piece <= self._context_length
            may_shrink = node.prunable and settings.num_candidates(end) > 0
            if not (fits and may_shrink and _is_whole(path)):
                continue
            tokens = np.concatenate([step.tokens for step in path])
            first = next(step for step in path if not step.repeated)
            return _Prefix(node, tree.namespace_of(node), tokens, first.slots.begin)
        return None

    def _repeat(self, prefix: _Prefix) -> int | None:
        """One pass; how many tokens it repeated, None if the prefix changed or room is short."""
        cache, settings = self._engine.cache, self._engine.sparsity
        if settings is None or not _is_whole(cache.tree.path_to(prefix.node)):
            return None
        piece = prefix.tokens[prefix.begin : prefix.begin + self._piece]
        fed = np.concatenate([np.asarray(self._prompt, np.int32), piece])
        sequence = None
        if cache.pool.num_free >= len(fed) * cache.rows:
            match = cache.match(prefix.namespace, prefix.tokens)
            sequence = cache.begin(match, len(fed), is_use=False)
        if sequence is None:
            cache.tree.unrepeated.offer(prefix.node)
            return None
        chunk = ChunkInput(
            sequence,
            fed,
            cache.extend(sequence, len(fed)),
            sparsity=RequestSparsity(_for_pass(settings, len(prefix.tokens), len(fed), len(piece))),
            sees_past=True,
        )
        self._engine.run(StepInput([], [chunk]))
        cache.release(prefix.namespace, sequence, prefix.tokens)
        return len(piece)

    def _finish(self, prefix: _Prefix) -> None:
        self._current = None
        for step in self._engine.cache.tree.path_to(prefix.node):
            step.repeated = True


def create_repetition(
    args: SparsityArgs, engine: Engine, encode: Callable[[str], list[int]], context_length: int
) -> Repetition | None:
    """What ``--tca-repetition`` asks for; None where nothing is ever repeated."""
    return Repetition(engine, encode(PROMPT), context_length) if repeats(args, engine) else None


def repeats(args: SparsityArgs, engine: Engine) -> bool:
    """Whether a server with these settings repeats cold prefixes."""
    if engine.sparsity is None or args.tca_retention != "on-pressure":
        return False
    if args.tca_repetition == "auto":
        # With a host tier nothing is lost; on a CPU, computing a text twice is too dear a guess.
        return engine.device.type == "cuda" and engine.cache.reclaimer.host is None
    return args.tca_repetition == "on"


def _is_whole(path: Sequence[RadixNode]) -> bool:
    """Whether a node is in the tree and nothing before its end has left the device."""
    return bool(path) and all(step.state == "full" for step in path)


def _for_pass(settings: SparsitySettings, end: int, fed: int, probes: int) -> SparsitySettings:
    """All ``end`` tokens of the prefix are scored, by all that is repeated.

    Candidates are whole blocks, so the last ones may be of the pass itself.
    """
    window = max(0, fed - -end % settings.block)
    return replace(
        settings,
        window=window,
        probes=probes,
        min_candidates=0,
        granularity=1 << 30,
        one_shot=False,
    )
