"""SGLang's frontend language from the unmodified package, without the engine's dependencies."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest


def load_frontend() -> Any:
    """A namespace with the frontend's names (``function``, ``gen``, ``RuntimeEndpoint``, ...).

    ``import sglang`` also loads the engine, which needs packages that a client does not have. So
    the package's own ``__init__`` is passed over by an empty namespace with the same path.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs sglang: pip install --no-deps -r requirements-clients.txt")
    if "sglang" not in sys.modules:
        package = types.ModuleType("sglang")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["sglang"] = package
    names: dict[str, Any] = {}
    for module in ("api", "choices", "backend.runtime_endpoint", "ir"):
        names |= vars(importlib.import_module(f"sglang.lang.{module}"))
    return types.SimpleNamespace(**names)
