"""Text from token ids, one token at a time.

Decoding goes through bytes: every token stands for a fixed byte string, and only the UTF-8
decoder has state. So a step costs the same however long the text is, and a character whose
bytes are spread over several tokens appears when its last byte does.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast


class TokenTable:
    """The bytes behind each token id of one tokenizer.

    Byte-level BPE (Llama 3, Qwen, SmolLM) and SentencePiece-style vocabularies (Llama 2, Mistral)
    are understood; which of them it is follows from the tokenizer's decoder.

    Raises
    ------
    ValueError
        If the tokenizer decodes in another way.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        self._added: dict[int, bytes] = {i: t.content.encode() for i, t in added.items()}
        self.special_ids = frozenset(i for i, t in added.items() if t.special)
        self._byte_of = _byte_of_char() if _is_byte_level(self._backend.decoder) else None
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; empty for ids beyond the vocabulary (padded embeddings have some)."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def text_of(self, token_id: int) -> str:
        """The token on its own; bytes that are no complete character show as U+FFFD."""
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written ``text``."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self.special_ids else None

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of is None:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode()
        try:
            return bytes(self._byte_of[char] for char in token)
        except KeyError:
            return token.encode()


class Detokenizer:
    """Incremental decoding of one output.

    The concatenation of all pieces equals decoding the whole sequence at once, except that a
    leading space stays: the text continues a prompt.
    """

    def __init__(self, table: TokenTable, skip_special_tokens: bool) -> None:
        self._table = table
        self._skipped = table.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._table.bytes_of(token_id))

    def feed_all(self, token_ids: Sequence[int]) -> str:
        """What ``feed`` would return for all of them together."""
        bytes_of, skipped = self._table.bytes_of, self._skipped
        return self._utf8.decode(b"".join(bytes_of(t) for t in token_ids if t not in skipped))

    def flush(self) -> str:
        """The end of the output: an unfinished character becomes U+FFFD."""
        return self._utf8.decode(b"", True)


def _is_byte_level(decoder: Any) -> bool:
    parts = _decoder_types(json.loads(decoder.__getstate__())) if decoder is not None else set()
    if "ByteLevel" in parts:
        return True
    if parts & {"Metaspace", "ByteFallback", "Replace"}:
        return False
    raise ValueError(
        f"the tokenizer's decoder {sorted(parts)} is neither byte-level nor SentencePiece-style"
    )


def _decoder_types(spec: dict[str, Any]) -> set[str]:
    nested = (_decoder_types(part) for part in spec.get("decoders", ()))
    return {spec["type"]}.union(*nested)


def _byte_of_char() -> dict[str, int]:
    # GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest is moved past 255.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(moved)}
