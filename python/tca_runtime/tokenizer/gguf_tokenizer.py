"""A fast tokenizer from the metadata of a GGUF file.

The file has the vocabulary and the merges, but only a name for the rule that splits text before
the merges apply (``tokenizer.ggml.pre``). The rules here are those of the original tokenizers.
"""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from tca_runtime.gguf_file import GgufError, GgufFile

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\u2581"

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2 splits numbers into single digits, Llama 3 into groups of up to three.
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("gpt-2", "default")
_SMOLLM = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
_TEKKEN = ("tekken",)
# A word of these vocabularies that is a token as a whole is taken so, whatever the merges say.
_IGNORE_MERGES = _LLAMA3 + _TEKKEN


def tokenizer_from_gguf(file: GgufFile) -> PreTrainedTokenizerFast:
    """Build the tokenizer that ``file`` describes, with special tokens and chat template.

    Raises
    ------
    GgufError
        If metadata is missing or names a kind of tokenizer that is not supported.
    """
    try:
        return _build(file)
    except KeyError as error:
        raise GgufError(f"{file.path}: metadata key {error} is missing") from error


def _build(file: GgufFile) -> PreTrainedTokenizerFast:
    prefix = "tokenizer.ggml."
    meta = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    kind = meta["model"]
    if kind == "gpt2":
        backend = _byte_level(meta, str(file.path))
    elif kind == "llama":
        backend = _sentencepiece(meta)
    else:
        raise GgufError(
            f"{file.path}: tokenizer model {kind!r} is not supported; supported are: gpt2, llama"
        )
    _add_special_tokens(backend, meta)
    if _adds_bos(meta):
        _prepend(backend, meta["tokens"][meta["bos_token_id"]], meta["bos_token_id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_token(meta, "bos_token_id"),
        eos_token=_token(meta, "eos_token_id"),
        unk_token=_token(meta, "unknown_token_id"),
        pad_token=_token(meta, "padding_token_id"),
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _byte_level(meta: dict[str, Any], where: str) -> Tokenizer:
    rule = meta.get("pre", "default")
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(meta["tokens"])},
            merges=[tuple(merge.split(" ")) for merge in meta["merges"]],
            ignore_merges=rule in _IGNORE_MERGES,
        )
    )
    if rule in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(rule, where)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(rule: str, where: str) -> pre_tokenizers.PreTokenizer:
    if rule in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule in _SMOLLM:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    patterns = {
        **dict.fromkeys(_LLAMA3, _LLAMA3_SPLIT),
        **dict.fromkeys(_QWEN2, _QWEN2_SPLIT),
        **dict.fromkeys(_TEKKEN, _TEKKEN_SPLIT),
    }
    if rule not in patterns:
        known = ", ".join((*_GPT2, *_SMOLLM, *patterns))
        raise GgufError(
            f"{where}: pre-tokenizer {rule!r} is not supported; supported are: {known}. "
            "--tokenizer-path takes the model's original tokenizer instead"
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(patterns[rule]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(meta: dict[str, Any]) -> Tokenizer:
    tokens = meta["tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_by_score(vocab, meta["scores"]),
            unk_token=_token(meta, "unknown_token_id") or "<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if meta.get("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_by_score(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best: merges in order of score."""
    ranked = []
    for piece, token_id in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[token_id], vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special_tokens(backend: Tokenizer, meta: dict[str, Any]) -> None:
    special: list[AddedToken] = []
    ordinary: list[AddedToken] = []
    for token, kind in zip(meta["tokens"], meta.get("token_type", ()), strict=False):
        if kind in (_UNKNOWN, _CONTROL):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            ordinary.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(ordinary)


def _adds_bos(meta: dict[str, Any]) -> bool:
    # Files that do not say follow llama.cpp's defaults.
    default = meta["model"] == "llama" or meta.get("pre") in _LLAMA3
    return bool(meta.get("add_bos_token", default)) and "bos_token_id" in meta


def _prepend(backend: Tokenizer, token: str, token_id: int) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, token_id)],
    )


def _token(meta: dict[str, Any], key: str) -> str | None:
    token_id = meta.get(key)
    return None if token_id is None else meta["tokens"][token_id]
