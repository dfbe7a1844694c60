"""A tokenizer that needs no files: one token per UTF-8 byte, for models with random weights."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Ids 0-255 are the bytes themselves; these follow.
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|endoftext|>", "<|im_end|>", "<|im_start|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """260 tokens, ChatML turns; ids beyond the vocabulary decode to nothing."""
    backend = Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> dict[str, int]:
    # GPT-2's printable stand-ins: bytes that print are themselves, the others count up from 256.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: 256 + index for index, byte in enumerate(others)}
    return {chr(stand_in.get(byte, byte)): byte for byte in range(256)}
