"""Model directories with something wrong: the message names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tca_runtime.config import ModelArgs
from tca_runtime.models.errors import ModelError
from tca_runtime.models.loader import load_model
from tca_runtime.tokenizer.loading import TokenizerError, load_tokenizer
from tests.models.checkpoints import random_model, save

WEIGHTS = "model.safetensors"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama"), tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama"), tmp_path_factory.mktemp("sharded"), max_shard_size="60KB")


def cut(share: float) -> Damage:
    def damage(directory: Path) -> None:
        content = (directory / WEIGHTS).read_bytes()
        (directory / WEIGHTS).write_bytes(content[: int(len(content) * share)])

    return damage


def stored_as(dtype: torch.dtype) -> Damage:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        save_file({name: t.to(dtype) for name, t in tensors.items()}, directory / WEIGHTS)

    return damage


def text(file: str, content: str) -> Damage:
    return lambda directory: (directory / file).write_text(content)


def fields(**changed: Any) -> Damage:
    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text()) | changed
        config = {key: value for key, value in config.items() if value is not ...}
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "generation_config.json").unlink()

    return damage


def damaged(source: Path, target: Path, damage: Damage) -> ModelArgs:
    directory = target / "model"
    shutil.copytree(source, directory)
    damage(directory)
    return ModelArgs(model_path=str(directory), device="cpu")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut(0.5), f"{WEIGHTS}: not a readable safetensors file"),
        (cut(0.001), f"{WEIGHTS}: not a readable safetensors file"),
        (cut(0.0), f"{WEIGHTS}: not a readable safetensors file"),
        (stored_as(torch.int8), f"{WEIGHTS}: tensor .* is stored as int8"),
        (stored_as(torch.float8_e4m3fn), f"{WEIGHTS}: tensor .* is stored as float8_e4m3fn"),
        (lambda d: (d / WEIGHTS).unlink(), "expected model.safetensors or .* found neither"),
        (text("config.json", "{oops"), "config.json: not valid JSON"),
        (text("config.json", "[]"), "config.json: expected a JSON object"),
        (fields(hidden_size=...), "config.json: field 'hidden_size' is missing"),
        (fields(hidden_size="wide"), "config.json: a field has a value of the wrong kind"),
        (fields(hidden_size=None), "config.json: a field has a value of the wrong kind"),
        (fields(architectures=[{}]), "config.json: a field has a value of the wrong kind"),
        (fields(num_hidden_layers=-3), "config.json: num_layers is -3"),
        (fields(num_attention_heads=0), "config.json: num_q_heads is 0"),
        (fields(num_key_value_heads=3), "config.json: 4 query heads over 3 KV heads"),
        (fields(eos_token_id="stop"), "config.json: eos_token_id"),
        (fields(dtype="int4"), "config.json: dtype 'int4' is not supported"),
    ],
)
def test_broken_file_is_named(sound: Path, tmp_path: Path, damage: Damage, expected: str) -> None:
    with pytest.raises(ModelError, match=expected) as raised:
        load_model(damaged(sound, tmp_path, damage))
    assert str(tmp_path) in str(raised.value)


def shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[1]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: shard(d).unlink(), "index.json: names model-00002-of-.*, which is not in"),
        (lambda d: shard(d).write_bytes(b""), "model-00002-of-.*: not a readable safetensors"),
        (text(f"{WEIGHTS}.index.json", "{"), "index.json: not a valid safetensors index"),
    ],
)
def test_broken_shard_is_named(
    sharded: Path, tmp_path: Path, damage: Damage, expected: str
) -> None:
    with pytest.raises(ModelError, match=expected):
        load_model(damaged(sharded, tmp_path, damage))


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "{")],
)
def test_broken_tokenizer_is_named(sound: Path, tmp_path: Path, file: str, content: str) -> None:
    args = damaged(sound, tmp_path, text(file, content))
    with pytest.raises(TokenizerError, match="the tokenizer cannot be loaded") as raised:
        load_tokenizer(args)
    assert args.model_path in str(raised.value)
