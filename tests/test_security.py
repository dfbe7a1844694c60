"""What crosses processes, and what is read from disk, never runs as code."""

from __future__ import annotations

import ast
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from tca_runtime.config import ModelArgs, RuntimeConfig
from tca_runtime.launch_server import socket_directory
from tca_runtime.models.errors import ModelError
from tca_runtime.models.loader import load_model
from tca_runtime.tokenizer.loading import load_tokenizer
from tests.models.checkpoints import FAMILIES, SIZES

RUNTIME = Path(__file__).parent.parent / "python" / "tca_runtime"
# They read or write Python objects that name the code to run.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "send_pyobj", "recv_pyobj"}


def test_nothing_is_pickled_or_evaluated() -> None:
    for path in RUNTIME.rglob("*.py"):
        tree = ast.parse(path.read_text())
        modules, calls = set(), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.Call):
                name = node.func
                if isinstance(name, ast.Name):
                    calls.add(name.id)
                elif isinstance(name, ast.Attribute) and name.attr.endswith("_pyobj"):
                    calls.add(name.attr)
                if isinstance(name, ast.Attribute) and ast.unparse(name) == "torch.load":
                    calls.add("eval")
                for keyword in node.keywords:
                    if keyword.arg == "trust_remote_code":
                        assert ast.unparse(keyword.value) == "False", path
        assert not modules & UNSAFE_MODULES, path
        assert not calls & UNSAFE_CALLS, path


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickled_checkpoint_is_refused_unread(tmp_path: Path, name: str) -> None:
    config = FAMILIES["llama"][0](**SIZES, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    mark = tmp_path / "mark"
    torch.save({"weights": Bomb(mark)}, tmp_path / name)
    with pytest.raises(ModelError, match=f"{name}.*safetensors"):
        load_model(ModelArgs(model_path=str(tmp_path), device="cpu"))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["weights.bin", "model.safetensors"])
def test_a_pickle_by_another_name_is_refused_unread(tmp_path: Path, name: str) -> None:
    config = FAMILIES["llama"][0](**SIZES, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    mark = tmp_path / "mark"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
    path = tmp_path if name.endswith("safetensors") else tmp_path / name
    with pytest.raises(ModelError):
        load_model(ModelArgs(model_path=str(path), device="cpu"))
    assert not mark.exists()


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass T: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}'
    )
    with pytest.raises(Exception, match=r"(?s).+"):
        load_tokenizer(ModelArgs(model_path=str(tmp_path)))
    assert not mark.exists()


def test_sockets_are_in_a_directory_of_this_user_alone() -> None:
    old = os.umask(0)
    try:
        with socket_directory() as directory:
            found = directory.stat()
            assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o700, os.getuid())
    finally:
        os.umask(old)
    assert not directory.exists()


def test_the_default_is_this_machine_only() -> None:
    assert RuntimeConfig().server.host == "127.0.0.1"
