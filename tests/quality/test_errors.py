"""The error certificate's bounds, on random attention and through a tiny model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.quality import errors, samples
from benchmark.quality.errors import certify
from benchmark.quality.generate import ruler_samples
from tca_runtime.models.loader import LoadedModel


def attention(keep: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, 50, generator=generator) * scale
    values = torch.randn(2, 50, 8, generator=generator)
    weights = logits.softmax(-1)
    kept = logits.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
    return weights, values, weights @ values[:, None], kept @ values[:, None]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_errors_stay_below_both_bounds(share: float) -> None:
    keep = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) < share
    keep[:, -1] = True
    weights, values, full, sparse = attention(keep)
    found = certify(weights, keep, values, full, sparse)
    assert 0 < found.error <= found.diameter <= found.theorem
    assert 0 < found.worst_ratio <= 1
    expected = float((weights * ~keep[:, None, None]).sum(-1).mean())
    assert found.dropped_mass == pytest.approx(expected)


def test_nothing_dropped_is_no_error() -> None:
    keep = torch.ones(2, 50, dtype=torch.bool)
    weights, values, full, sparse = attention(keep)
    found = certify(weights, keep, values, full, sparse)
    assert (found.error, found.theorem, found.worst_ratio) == (0.0, 0.0, 0.0)


def test_layers_of_a_model(
    loaded: LoadedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = list(ruler_samples(tokenizer, 3000, 1, 0, ["niah_single_1", "qa_squad"]))
    samples.write(tmp_path / "d.jsonl.xz", data)
    monkeypatch.setattr(errors.lab, "load", lambda *args: loaded)
    monkeypatch.setattr(errors, "load_tokenizer", lambda args: tokenizer)
    parser = argparse.ArgumentParser()
    errors.add_arguments(parser)
    output = tmp_path / "out" / "errors.json"
    command = ["--model", "m/tiny", "--data", str(tmp_path / "d.jsonl.xz")]
    command += ["--output", str(output), "--configurations", "tca p100 d40", "tca p100 d100"]
    errors.run(parser.parse_args(command))
    report = json.loads(output.read_text())
    sparse, everything = report["configurations"].values()
    assert len(sparse) == 3 == len(everything)
    for layer in sparse:
        assert 0 < layer["error"] < layer["theorem"]
        assert layer["worst_ratio"] <= 1
    # The first layer's queries are equal in both passes: its error is all there is.
    assert sparse[0]["accumulated"] == pytest.approx(sparse[0]["error"], rel=0.5)
    assert sparse[-1]["accumulated"] > 0
    for layer in everything:
        assert layer["error"] < 1e-5 and layer["accumulated"] < 1e-5
