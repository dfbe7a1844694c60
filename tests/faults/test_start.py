"""Servers that cannot start: status 1 and one clear line, no traceback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.faults.launched import TINY, start_that_fails
from tests.models.checkpoints import random_model, save

pytestmark = pytest.mark.slow


def test_port_in_use_is_told_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = start_that_fails(*TINY, "--port", port)
    assert done.returncode == 1
    assert done.stderr.strip().startswith(f"error: cannot listen on 127.0.0.1:{port}")


def test_missing_model_is_named() -> None:
    done = start_that_fails("--model-path", "/no/such/model", "--port", "0")
    assert done.returncode == 1
    assert "/no/such/model" in done.stderr and "Traceback" not in done.stderr


def test_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("{}")
    done = start_that_fails(*TINY, "--port", "0", "--tca-config", str(path))
    assert done.returncode == 1
    assert f"error: cannot read the TCA configuration {path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_broken_weights_are_named(tmp_path: Path) -> None:
    weights = save(random_model("llama"), tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    done = start_that_fails("--model-path", str(tmp_path), "--port", "0", "--device", "cpu")
    assert done.returncode == 1
    assert f"error: {weights}: not a readable safetensors file" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    save(random_model("llama"), tmp_path)
    done = start_that_fails("--model-path", str(tmp_path), "--port", "0", "--device", "cpu")
    assert done.returncode == 1
    assert f"error: {tmp_path}: expected tokenizer files there" in done.stderr
    assert "Traceback" not in done.stderr
