"""Token ids from text, without blocking the event loop on long prompts."""

from __future__ import annotations

import asyncio

from transformers import PreTrainedTokenizerFast

# Below this the encoding is cheaper than a hop to another thread and back.
_INLINE_CHARACTERS = 4096
# Normalisation may compose characters before tokens are looked for.
_SHRINKING = 4


class Encoder:
    """Tokenises prompts; special tokens written out in the text become their ids.

    Attributes
    ----------
    characters_per_token : no token stands for more text than this
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer file may carry its training's truncation; a prompt must never be cut silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        longest = max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)
        self.characters_per_token = longest * _SHRINKING

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; ``add_special_tokens`` adds BOS where the tokenizer does so."""
        if len(text) <= _INLINE_CHARACTERS:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        return await asyncio.to_thread(self._encode_unlocked, text, add_special_tokens)

    def _encode_unlocked(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of the backend's calls only the batch ones release the interpreter lock.
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids
