"""Prompts become the ids that the tokenizer itself would give."""

from __future__ import annotations

import asyncio
import copy

from tca_runtime.tokenizer.encode import Encoder
from tests.tokenizer.toy_tokenizers import EOS, IM_START, byte_level, sentencepiece


def test_short_and_long_texts_agree_with_the_tokenizer() -> None:
    encoder = Encoder(byte_level())
    for text in ("hello world", "hello world, naïve 🙂 " * 1000):
        assert asyncio.run(encoder.encode(text)) == byte_level()(text)["input_ids"]


def test_bos_is_added_only_where_wanted() -> None:
    encoder = Encoder(sentencepiece())
    for text in ("hello", "hello " * 2000):
        plain = asyncio.run(encoder.encode(text, add_special_tokens=False))
        assert asyncio.run(encoder.encode(text)) == [1, *plain]
        assert plain[0] != 1


def test_special_tokens_in_the_text_become_their_ids() -> None:
    encoder = Encoder(byte_level())
    assert asyncio.run(encoder.encode(f"{IM_START}{EOS}")) == [1, 0]


def test_a_tokenizer_that_truncates_does_not_cut_prompts() -> None:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert len(asyncio.run(Encoder(tokenizer).encode("hello there; " * 10))) > 4
