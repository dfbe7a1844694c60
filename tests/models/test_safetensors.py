"""Errors of broken Hugging Face directories name the file and the tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tca_runtime.config import ModelArgs
from tca_runtime.models.errors import ModelError
from tca_runtime.models.loader import load_model
from tests.models.checkpoints import random_model, save


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(random_model("llama"), tmp_path)


def expect(directory: Path, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        load_model(ModelArgs(model_path=str(directory), device="cpu"))


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    expect(directory, r"expected model\.safetensors or model\.safetensors\.index\.json")


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_file(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    expect(directory, r"model\.safetensors: not a readable safetensors file")


def test_missing_tensor(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    expect(directory, r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing")


def test_misshapen_tensor(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors[name] = tensors[name][:5].contiguous()
    save_file(tensors, path)
    expect(directory, r"layers\.2\.self_attn\.k_proj\.weight' has shape \(5, 64\), expected \(32,")


def test_missing_shard(tmp_path: Path) -> None:
    save(random_model("llama"), tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    expect(tmp_path, rf"index\.json: names {shard.name}, which is not in")


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"weight_map": []})])
def test_broken_index(tmp_path: Path, content: str) -> None:
    save(random_model("llama"), tmp_path, max_shard_size="60KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    expect(tmp_path, r"index\.json: not a valid safetensors index")
