"""Next-token distributions beside full attention."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmark.quality import sources
from benchmark.quality.configurations import Configuration
from benchmark.quality.lab import Lab
from benchmark.quality.likelihood import divergence, passages, run_likelihood
from benchmark.quality.records import Records
from tca_runtime.models.loader import LoadedModel
from tests.quality.conftest import invented_words


def logs(*pairs: tuple[float, int]) -> list[tuple[float, int]]:
    return [(math.log(p), token) for p, token in pairs]


def test_divergence_is_kl_with_the_rest_as_one() -> None:
    full, mine = logs((0.5, 1), (0.3, 2)), logs((0.4, 2), (0.25, 1), (0.1, 3))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.4) + 0.2 * math.log(0.2 / 0.35)
    assert divergence(mine, full) == pytest.approx(expected)
    assert divergence(full, full) == pytest.approx(0.0, abs=1e-12)


def test_an_unknown_token_is_as_unlikely_as_the_last() -> None:
    full, mine = logs((0.5, 1), (0.5, 9)), logs((0.5, 1), (0.1, 3))
    assert divergence(mine, full) > 0.5 * math.log(0.5 / 0.1) - 1e-6


def test_full_attention_equals_itself_and_less_does_not(
    loaded: LoadedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(invented_words(5000, 8))
    monkeypatch.setattr(sources, "book", lambda name: text)
    data = list(passages(3300, 2, seed=0))
    assert data == list(passages(3300, 2, seed=0))
    lab = Lab(loaded, tokens=8000)
    records = Records(tmp_path / "r.jsonl")
    configurations = [
        Configuration.parse(name) for name in ("full", "tca p5 d5 every512", "tca p100 d100")
    ]
    labels = {"model": "tiny", "data": "books"}
    run_likelihood(lab, tokenizer, data, configurations, records, labels)
    assert len(records.records) == 6
    for record in records.records:
        exact = record["config"] != "tca p5 d5 every512"
        assert (record["kl"] < 1e-5) == exact
        assert (record["agree"] > 0.999) == exact
        assert record["nll"] > 0
        if exact:
            assert record["same"] == record["generated"]
    run_likelihood(lab, tokenizer, data, configurations, records, labels)
    assert len(records.records) == 6
