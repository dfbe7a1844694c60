"""Tokenizers from directories, from GGUF metadata, and without any files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st

from tca_runtime.config import ModelArgs
from tca_runtime.gguf_file import GgufError
from tca_runtime.tokenizer.loading import load_tokenizer
from tests.tokenizer.toy_tokenizers import CORPUS, EOS, IM_END, IM_START, byte_level

TEXTS = [*CORPUS, " two  spaces\tand\r\n\r\nlines ", "don't I'LL 3.14 1234567 ²½", "", " "]
DUMMY = load_tokenizer(ModelArgs(load_format="dummy", model_config="tiny"))


def load(path: Path, **settings: Any) -> Any:
    return load_tokenizer(ModelArgs(model_path=str(path), **settings))


def write_byte_level(path: Path, pre: str | None, **settings: Any) -> Path:
    """The toy byte-level vocabulary as GGUF metadata."""
    tokenizer = byte_level()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = tokenizer.added_tokens_decoder
    kinds = [
        TokenType.NORMAL
        if i not in added
        else TokenType.CONTROL
        if added[i].special
        else TokenType.USER_DEFINED
        for i in range(len(tokens))
    ]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(settings.pop("model", "gpt2"))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids(EOS))
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids(IM_END))
    for add, value in settings.items():
        getattr(writer, add)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_directory(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    tokenizer = load(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == byte_level().encode(text)
    assert tokenizer.eos_token == IM_END
    assert tokenizer.chat_template == byte_level().chat_template


def test_tokenizer_path_wins_over_the_model(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path / "tokenizer")
    args = ModelArgs(
        model_path=str(tmp_path / "absent"), tokenizer_path=str(tmp_path / "tokenizer")
    )
    assert load_tokenizer(args).eos_token == IM_END


def test_gguf_equals_the_tokenizer_it_was_made_from(tmp_path: Path) -> None:
    tokenizer = load(write_byte_level(tmp_path / "t.gguf", "gpt-2"))
    for text in [*TEXTS, f"{IM_START}user\nhi{IM_END}\n<tool_call>x"]:
        ids = byte_level().encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(byte_level())
    assert (tokenizer.bos_token, tokenizer.eos_token) == (EOS, IM_END)
    assert {EOS, IM_START, IM_END} == {
        t.content for t in tokenizer.added_tokens_decoder.values() if t.special
    }


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "ĠI", "'", "LL", "Ġ12345", "ĊĊ", "Ġx", "!!", "Ċ"]),
        ("default", ["It", "'s", "ĠI", "'", "LL", "Ġ12345", "ĊĊ", "Ġx", "!!", "Ċ"]),
        (
            "smollm",
            ["It", "'s", "ĠI", "'", "LL", "Ġ", "1", "2", "3", "4", "5"] + ["ĊĊ", "Ġx", "!!", "Ċ"],
        ),
        ("llama-bpe", ["It", "'s", "ĠI", "'LL", "Ġ", "123", "45", "ĊĊ", "Ġx", "!!Ċ"]),
        ("qwen2", ["It", "'s", "ĠI", "'LL", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġx", "!!Ċ"]),
        ("tekken", ["It", "'s", "ĠI", "'LL", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġx", "!!Ċ"]),
    ],
)
def test_text_is_split_by_the_rule_the_file_names(
    pre: str, pieces: list[str], tmp_path: Path
) -> None:
    rule = load(write_byte_level(tmp_path / "t.gguf", pre)).backend_tokenizer.pre_tokenizer
    assert [p for p, _ in rule.pre_tokenize_str("It's I'LL 12345\n\n x!!\n")] == pieces


def test_qwen2_composes_accents(tmp_path: Path) -> None:
    tokenizer = load(write_byte_level(tmp_path / "t.gguf", "qwen2"))
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")


@pytest.mark.parametrize(
    ("pre", "flag", "adds"),
    [("gpt-2", None, 0), ("gpt-2", True, 1), ("llama-bpe", None, 1), ("llama-bpe", False, 0)],
)
def test_bos_is_added_when_the_file_says_so(
    pre: str, flag: bool | None, adds: int, tmp_path: Path
) -> None:
    settings = {} if flag is None else {"add_add_bos_token": flag}
    tokenizer = load(write_byte_level(tmp_path / "t.gguf", pre, **settings))
    bos = [tokenizer.bos_token_id] * adds
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == bos + plain
    assert tokenizer.bos_token_id not in plain


def test_chat_template_of_the_file_and_of_the_user(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    path = write_byte_level(tmp_path / "t.gguf", "gpt-2", add_chat_template=template)
    messages = [{"role": "user", "content": "hi"}]
    assert load(path).apply_chat_template(messages, tokenize=False) == "[hi]"
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0].role }}!")
    changed = load(path, chat_template=str(own))
    assert changed.apply_chat_template(messages, tokenize=False) == "user!"
    with pytest.raises(ValueError, match=r"--chat-template .*absent\.jinja"):
        load(path, chat_template=str(tmp_path / "absent.jinja"))


def test_unsupported_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="pre-tokenizer 'viking' is not supported.*--tokenizer-p"):
        load(write_byte_level(tmp_path / "a.gguf", "viking"))
    with pytest.raises(GgufError, match="tokenizer model 'bert' is not supported"):
        load(write_byte_level(tmp_path / "b.gguf", "gpt-2", model="bert"))
    with pytest.raises(ValueError, match="expected tokenizer files"):
        load(tmp_path)


PIECES = [
    *("\u2581", "h", "e", "l", "o", "\u2581h", "he", "ll", "hell", "\u2581hello", "lo"),
    *("\u2581he", "hello", "\u2581\u2581", "\u00e9"),
]


def spm_encode(text: str) -> list[str]:
    """SentencePiece's BPE by its definition: join the best-scored pair, leftmost first."""
    score = {piece: -i for i, piece in enumerate(PIECES)}
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(score.get(a + b), -i) for i, (a, b) in enumerate(pairwise(parts))]
        best = max((p for p in pairs if p[0] is not None), default=None)
        if best is None:
            break
        i = -best[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    known = [[p] if p in score else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [piece for group in known for piece in group]


@pytest.fixture(scope="module")
def spm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spm") / "t.gguf"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(PIECES)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores([0.0] * 259 + [float(-i) for i in range(len(PIECES))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_sentencepiece_from_gguf(spm_path: Path) -> None:
    tokenizer = load(spm_path)

    @given(st.text(alphabet="helo \u00e9x\u4f60", max_size=30))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        if text:
            assert tokenizer.convert_ids_to_tokens(ids[1:]) == spm_encode(text)
        assert tokenizer.decode(ids[1:]) == text

    check()
    assert tokenizer.encode("</s>", add_special_tokens=False)[-1] == tokenizer.eos_token_id


# Names of special tokens are the one thing that is not spelled in bytes.
@given(st.text(max_size=60).filter(lambda text: "<|" not in text))
def test_byte_tokenizer_is_utf8(text: str) -> None:
    ids = DUMMY.encode(text)
    assert bytes(ids) == text.encode()
    assert DUMMY.decode(ids) == text


def test_byte_tokenizer_special_tokens_and_chat() -> None:
    prompt = DUMMY.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = DUMMY.encode(prompt)
    assert ids.count(DUMMY.eos_token_id) == 1
    assert DUMMY.decode(ids) == prompt
    assert DUMMY.decode([104, 5000, 105]) == "hi"


@pytest.mark.slow
def test_smollm2() -> None:
    tokenizer = load_tokenizer(ModelArgs())
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" 12345")) == 6
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(chat)
    assert chat.endswith(f"{IM_START}assistant\n")
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert tokenizer.eos_token_id == 2
