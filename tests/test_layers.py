"""Imports go down the layers only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "python" / "tca_runtime"
PACKAGE = "tca_runtime"

# What each package may import of the runtime, besides itself.
BASE = {
    "config",
    "messages",
    "sampling_params",
    "channels",
    "garbage",
    "stdio",
    "fetch_model",
    "gguf_file",
    "logs",
}
LOW = {"attention", "cache", "sparsity"}
ALLOWED = {
    "attention": LOW | BASE,
    "cache": LOW | BASE,
    "sparsity": LOW | BASE,
    "models": LOW | BASE,
    "engine": LOW | BASE | {"models"},
    "calibration": LOW | BASE | {"models", "engine", "tokenizer"},
    "scheduler": LOW | BASE | {"models", "engine", "tokenizer"},
    "tokenizer": BASE,
    "server": BASE | {"tokenizer"},
}


def imported_packages(path: Path) -> set[str]:
    """First-level packages of the runtime that a module imports, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_go_down(package: str) -> None:
    modules = list((ROOT / package).rglob("*.py"))
    assert modules
    for path in modules:
        extra = imported_packages(path) - ALLOWED[package] - {package}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_cache_knows_no_model_no_http_and_no_sockets() -> None:
    for path in (ROOT / "cache").rglob("*.py"):
        text = path.read_text()
        assert not any(f"import {name}" in text for name in ("zmq", "fastapi", "transformers"))


def test_kernels_import_nothing_of_the_runtime() -> None:
    for path in (ROOT.parent.parent / "kernels").rglob("*.py"):
        assert PACKAGE not in path.read_text(), path


def test_every_package_is_covered() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(ALLOWED)
