"""Constrained output: grammars compiled off the scheduler's loop, and their token masks."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tca_runtime.engine.job_pool import JobPool
from tca_runtime.sampling_params import Grammar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KIND_NAMES = {
    "regex": "regex",
    "json_schema": "JSON schema",
    "ebnf": "EBNF grammar",
    "json": "JSON grammar",
}
# Whitespace in a row inside JSON: room to indent, but no endless run of blanks, which is where
# small models like to go when a mask takes their first choice away.
_MAX_WHITESPACE = 32
_ANY_OBJECT = '{"type": "object"}'
# "[12:00:00] /path/file.cc:83: " and "Check failed: (x) is false: " in front of a message.
_NATIVE_PREFIX = re.compile(r"\[[\d:]+\] \S+:\d+: |Check failed: \(.*?\)( is (true|false))?: ")
_MAX_MESSAGE = 400


class GrammarError(ValueError):
    """A grammar that cannot be used; ``status`` is the HTTP status that says whose fault it is."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class GrammarMatcher:
    """One request's way through its grammar.

    Once the grammar is complete and allows no further text, only end-of-sequence ids are allowed.
    """

    # Ambiguous grammars cost time polynomial in the output's length. Past this much processor
    # time for one token, the request would hold up all others.
    MAX_STEP_SECONDS = 0.5

    def __init__(self, native: Any) -> None:
        self._native = native
        self._seconds = 0.0

    @property
    def is_terminated(self) -> bool:
        """Whether the grammar's end-of-sequence was accepted: the request must end."""
        return bool(self._native.is_terminated())

    def fill(self, bitmask: Tensor, row: int) -> None:
        """Write the tokens allowed next: bit t of row ``row`` of the int32 ``[B, V/32]`` mask."""
        if self.is_terminated:
            return
        start = time.thread_time()
        self._native.fill_next_token_bitmask(bitmask, row)
        self._seconds = time.thread_time() - start

    def accept(self, token: int) -> None:
        """Advance by one token.

        Raises
        ------
        GrammarError
            When the grammar does not allow the token, which for one drawn under the mask means
            that it allowed none; and when following the grammar takes too long.
        """
        start = time.thread_time()
        accepted = self._native.accept_token(token)
        self._seconds += time.thread_time() - start
        if not accepted:
            raise GrammarError(f"the grammar does not allow token {token} here, or any other")
        if self._seconds > self.MAX_STEP_SECONDS:
            raise GrammarError(
                f"the grammar is too ambiguous: one token took {self._seconds:.1f} s to check, "
                f"the limit is {self.MAX_STEP_SECONDS:g} s"
            )


class CompiledGrammar:
    """A grammar ready for any number of requests."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.num_bytes = int(native.memory_size_bytes)

    def matcher(self) -> GrammarMatcher:
        """A fresh start of the grammar, for one request."""
        import xgrammar

        return GrammarMatcher(xgrammar.GrammarMatcher(self._native))


class GrammarCompiler:
    """Compiles grammars for one model, in the background, and keeps the recent ones.

    Failures are kept as well, so that a grammar that takes too long is tried once. Compilation
    cannot be interrupted: see `JobPool` for what becomes of a thread past the time limit. Only
    one thread may submit and release.
    """

    MAX_CACHED = 256

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_ids: Sequence[int],
        time_limit: float = 20.0,
        cache_bytes: int = 256 << 20,
    ) -> None:
        """
        Parameters
        ----------
        vocab_size : width of the model's logits, which may exceed the tokenizer's vocabulary
        eos_ids : ids that end a sequence, from the model's configuration
        time_limit : seconds that one compilation may take
        cache_bytes : memory for compiled grammars that are kept
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._time_limit = time_limit
        self._cache_bytes = cache_bytes
        self._pool: JobPool[CompiledGrammar] = JobPool(
            workers=2, time_limit=time_limit, max_late=4, refusal=_refusal
        )
        self._cache: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._users: Counter[Future[CompiledGrammar]] = Counter()
        self._prepare_lock = threading.Lock()
        self._native: Any = None

    def submit(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Compile in the background; never blocks. Every failure is a `GrammarError`.

        Each submission must be released once.
        """
        future = self._cache.get(grammar)
        if future is None or _is_refused(future):
            future = self._begin(grammar)
        else:
            self._cache.move_to_end(grammar)
        self._users[future] += 1
        return future

    def release(self, grammar: Grammar, future: Future[CompiledGrammar]) -> None:
        """End a submission: its request has the result, or ended without it.

        A compilation that nobody waits for any more is not begun.
        """
        self._users[future] -= 1
        if self._users[future] > 0:
            return
        del self._users[future]
        forgotten = self._pool.cancel(future) or _is_refused(future)
        if forgotten and self._cache.get(grammar) is future:
            del self._cache[grammar]

    def _begin(self, grammar: Grammar) -> Future[CompiledGrammar]:
        kind = _KIND_NAMES[grammar.kind]
        late = GrammarError(f"compiling the {kind} takes longer than {self._time_limit:g} s")
        future = self._pool.submit(lambda: self._compile(grammar), late)
        self._cache.pop(grammar, None)
        if not _is_refused(future):
            self._cache[grammar] = future
            self._evict()
        return future

    def _evict(self) -> None:
        sizes = {key: _num_bytes(future) for key, future in self._cache.items()}
        total = sum(sizes.values())
        while len(self._cache) > self.MAX_CACHED or total > self._cache_bytes:
            key, _ = self._cache.popitem(last=False)
            total -= sizes[key]

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        native = self._prepare()
        try:
            compiled = CompiledGrammar(_compile_native(native, grammar))
        except Exception as error:
            reason = _NATIVE_PREFIX.sub("", str(error)).strip()[:_MAX_MESSAGE]
            raise GrammarError(f"invalid {_KIND_NAMES[grammar.kind]}: {reason}") from error
        mask = full_mask(1, self._vocab_size)
        compiled.matcher().fill(mask, 0)
        if not mask.any():
            raise GrammarError(f"the {_KIND_NAMES[grammar.kind]} allows no text at all")
        return compiled

    def _prepare(self) -> Any:
        """The native compiler, built by the first job: no start-up time without a grammar."""
        with self._prepare_lock:
            if self._native is None:
                try:
                    self._native = self._build()
                except Exception as error:
                    raise GrammarError(
                        f"constrained output is not possible with this tokenizer: {error}"
                    ) from error
            return self._native

    def _build(self) -> Any:
        import xgrammar

        eos_ids = self._eos_ids or None
        info = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=eos_ids
        )
        # Special tokens are no text, although their names could match a grammar.
        special = set(self._tokenizer.all_special_ids)
        special |= {i for i, t in self._tokenizer.added_tokens_decoder.items() if t.special}
        text = [""] * self._vocab_size
        for token, index in self._tokenizer.get_vocab().items():
            if index < self._vocab_size and index not in special:
                text[index] = token
        info = xgrammar.TokenizerInfo(
            text,
            info.vocab_type,
            vocab_size=self._vocab_size,
            stop_token_ids=info.stop_token_ids,
            add_prefix_space=info.add_prefix_space,
        )
        threads = min(8, max(1, (os.cpu_count() or 1) // 2))
        return xgrammar.GrammarCompiler(info, max_threads=threads, cache_enabled=False)


def full_mask(num_rows: int, vocab_size: int) -> Tensor:
    """A mask that allows everything: int32 ``[num_rows, ceil(vocab_size / 32)]``, on the host."""
    return torch.full((num_rows, -(-vocab_size // 32)), -1, dtype=torch.int32)


def allowed_tokens(matchers: Sequence[GrammarMatcher | None], vocab_size: int) -> Tensor:
    """The mask of a batch; rows without a matcher allow everything."""
    mask = full_mask(len(matchers), vocab_size)
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            matcher.fill(mask, row)
    return mask


def forbid_others(logits: Tensor, mask: Tensor) -> None:
    """Set logits ``[B, V]`` to -inf where a mask on the same device does not allow the token."""
    import xgrammar

    xgrammar.apply_token_bitmask_inplace(logits, mask, vocab_size=logits.shape[1])


def _compile_native(compiler: Any, grammar: Grammar) -> Any:
    if grammar.kind == "regex":
        return compiler.compile_regex(grammar.value)
    if grammar.kind == "ebnf":
        return compiler.compile_grammar(grammar.value)
    schema = grammar.value if grammar.kind == "json_schema" else _ANY_OBJECT
    return compiler.compile_json_schema(schema, max_whitespace_cnt=_MAX_WHITESPACE)


def _refusal() -> GrammarError:
    return GrammarError("too many slow grammars are being compiled", 503)


def _is_refused(future: Future[CompiledGrammar]) -> bool:
    """Whether another attempt may go better."""
    error = future.exception() if future.done() else None
    return isinstance(error, GrammarError) and error.status == 503


def _num_bytes(future: Future[CompiledGrammar]) -> int:
    if not future.done() or future.exception() is not None:
        return 0
    return future.result().num_bytes
