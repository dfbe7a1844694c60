"""The engine as a GPU runs it, selections of a step batched, on the CPU with reference kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

import tca_runtime.attention.registry as registry
from tca_runtime.attention.base import AttentionShape
from tca_runtime.attention.triton_backend import TritonBackend
from tca_runtime.sparsity.batched import BatchedSelection
from tca_runtime.sparsity.last_queries import LastQueries
from tests.gpu.tiny import loop, random_prompts, write_model


class OnTheCpu(TritonBackend):
    @classmethod
    def unsupported(cls, shape: AttentionShape) -> str | None:
        return None


def test_tokens_equal_those_of_selections_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of one chunk and of several, the last of which see their whole past or not."""
    model = write_model(tmp_path / "m")
    prompts = random_prompts([300, 1200, 2600])
    monkeypatch.setitem(registry._CANDIDATES, "triton", lambda: OnTheCpu)
    ended: list[int] = []
    chosen: list[int] = []
    decode_views, call = LastQueries.decode_views, BatchedSelection.__call__

    def counting(self: LastQueries) -> object:
        ended.append(len(self._works))
        return decode_views(self)

    def choosing(self: BatchedSelection, layer: int, q: object) -> object:
        chosen.append(layer)
        return call(self, layer, q)

    monkeypatch.setattr(LastQueries, "decode_views", counting)
    monkeypatch.setattr(BatchedSelection, "__call__", choosing)
    expected = loop(model, "cpu", "torch", tca="uniform:0.3").generate(prompts, 24)
    assert not ended and not chosen
    found = loop(model, "cpu", "triton", tca="uniform:0.3").generate(prompts, 24)
    assert found == expected
    assert ended and chosen, "both ways of choosing were taken"
