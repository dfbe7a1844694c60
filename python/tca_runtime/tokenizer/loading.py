"""The tokenizer that belongs to a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tca_runtime.config import ModelArgs
from tca_runtime.fetch_model import resolve
from tca_runtime.gguf_file import GgufFile
from tca_runtime.tokenizer.byte_tokenizer import byte_tokenizer
from tca_runtime.tokenizer.gguf_tokenizer import tokenizer_from_gguf


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded; the message names the file or directory."""


def load_tokenizer(args: ModelArgs) -> PreTrainedTokenizerFast:
    """Load the tokenizer of ``--tokenizer-path``, by default the model's own.

    A model with random weights that has no files gets a byte-level tokenizer.

    Raises
    ------
    FetchError
        If the path does not exist and is no known model.
    GgufError
        If a GGUF file cannot be read or its tokenizer is not supported.
    TokenizerError
        If a directory has no usable fast tokenizer, or the chat template cannot be read.
    """
    if args.tokenizer_path is None and args.load_format == "dummy" and not _has_files(args):
        tokenizer = byte_tokenizer()
    else:
        path = resolve(args.tokenizer_path or args.model_path)
        tokenizer = _from_directory(path) if path.is_dir() else tokenizer_from_gguf(GgufFile(path))
    if args.chat_template is not None:
        tokenizer.chat_template = _read_template(Path(args.chat_template).expanduser())
    return tokenizer


def _has_files(args: ModelArgs) -> bool:
    path = Path(args.model_path).expanduser()
    if args.model_config is not None or not path.exists():
        return False
    return path.is_file() or any(path.glob("tokenizer*"))


def _from_directory(directory: Path) -> PreTrainedTokenizerFast:
    if not any(directory.glob("tokenizer*")):
        raise TokenizerError(
            f"{directory}: expected tokenizer files there (tokenizer.json), found none; "
            "--tokenizer-path names another place"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise TokenizerError(f"{directory}: the tokenizer cannot be loaded ({error!r})") from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{directory}: the tokenizer has no fast version (tokenizer.json)")
    return tokenizer


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"--chat-template {path}: {error}") from error
