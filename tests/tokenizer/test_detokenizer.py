"""Incremental decoding agrees with decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tca_runtime.tokenizer.detokenizer import Detokenizer, TokenTable
from tests.tokenizer.toy_tokenizers import EOS, IM_END, byte_level, sentencepiece

BYTE_TABLE = TokenTable(byte_level())
PIECE_TABLE = TokenTable(sentencepiece())
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


def decode(table: TokenTable, ids: list[int], skip_special: bool) -> tuple[str, list[str]]:
    detokenizer = Detokenizer(table, skip_special)
    pieces = [detokenizer.feed(i) for i in ids]
    return "".join(pieces) + detokenizer.flush(), pieces


@given(st.lists(st.integers(0, len(byte_level()) - 1), max_size=40), st.booleans())
def test_byte_level_equals_whole_decode_for_any_ids(ids: list[int], skip_special: bool) -> None:
    whole = byte_level().decode(ids, skip_special_tokens=skip_special)
    assert decode(BYTE_TABLE, ids, skip_special)[0] == whole


@given(
    st.lists(st.lists(st.integers(0, len(byte_level()) - 1), max_size=8), max_size=8), st.booleans()
)
def test_tokens_told_together_give_the_text_that_each_alone_would(
    batches: list[list[int]], skip_special: bool
) -> None:
    detokenizer = Detokenizer(BYTE_TABLE, skip_special)
    together = "".join(map(detokenizer.feed_all, batches)) + detokenizer.flush()
    ids = [token_id for batch in batches for token_id in batch]
    assert together == decode(BYTE_TABLE, ids, skip_special)[0]


@given(TEXTS)
def test_byte_level_round_trip_never_shows_half_a_character(text: str) -> None:
    ids = byte_level().encode(text, add_special_tokens=False)
    whole, pieces = decode(BYTE_TABLE, ids, False)
    assert whole == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


@given(TEXTS)
def test_sentencepiece_equals_whole_decode(text: str) -> None:
    # Names of special tokens are read as such, and a piece writes its space as this character.
    assume(not any(name in text for name in (*sentencepiece().all_special_tokens, "\u2581")))
    ids = sentencepiece().encode(text, add_special_tokens=False)
    whole, _ = decode(PIECE_TABLE, ids, False)
    # The whole decode drops the space that the normaliser put before the text.
    assert whole.removeprefix(" ") == sentencepiece().decode(ids)
    assert whole == " " + text or not text


def test_sentencepiece_continuation_keeps_its_space() -> None:
    ids = sentencepiece().encode("hello the", add_special_tokens=False)
    second_word = next(i for i, t in enumerate(ids) if i and PIECE_TABLE.text_of(t)[0] == " ")
    assert decode(PIECE_TABLE, ids[second_word:], True)[0] == " the"


def test_character_appears_with_its_last_byte() -> None:
    by_bytes = {BYTE_TABLE.bytes_of(i): i for i in range(len(byte_level()))}
    ids = [by_bytes[bytes([b])] for b in "🙂".encode()]
    text, pieces = decode(BYTE_TABLE, ids, True)
    assert (text, pieces) == ("🙂", ["", "", "", "🙂"])
    assert decode(BYTE_TABLE, ids[:3], True)[0] == "\ufffd"


def test_special_tokens_are_skipped_only_on_request() -> None:
    ids = byte_level().encode(f"hi{IM_END}<tool_call>")
    assert decode(BYTE_TABLE, ids, True)[0] == "hi<tool_call>"
    assert decode(BYTE_TABLE, ids, False)[0] == f"hi{IM_END}<tool_call>"


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    assert BYTE_TABLE.bytes_of(10**6) == b""


def test_special_ids_by_text() -> None:
    assert BYTE_TABLE.special_id(EOS) == 0
    assert BYTE_TABLE.special_id("<tool_call>") is None
    assert BYTE_TABLE.special_id("hello") is None


def test_unknown_decoder_is_refused() -> None:
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        TokenTable(PreTrainedTokenizerFast(tokenizer_object=backend))
