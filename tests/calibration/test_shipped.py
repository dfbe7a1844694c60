"""The data and configurations that come with the runtime fit together."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from tca_runtime.calibration.data import CalibrationData
from tca_runtime.calibration.options import DEFAULT_DATA
from tca_runtime.config import SparsityArgs
from tca_runtime.sparsity import load
from tca_runtime.sparsity.settings import (
    CalibrationFile,
    ConfigurationError,
    ModelIdentity,
    SparsitySettings,
)

CONFIGS = sorted((Path(load.__file__).parent / "configs").glob("*.json"))
THRESHOLDS = [0.6, 0.8, 0.9, 0.95]
LONGEST_CHARACTERS = 120_000


@pytest.fixture(scope="module")
def data() -> CalibrationData:
    return CalibrationData.load(DEFAULT_DATA)


def test_data_has_all_kinds_and_long_texts(data: CalibrationData) -> None:
    assert sorted(data.texts) == ["book", "chat", "retrieval"]
    for texts in data.texts.values():
        assert len(set(texts)) == len(texts) >= 6
        assert max(map(len, texts)) > LONGEST_CHARACTERS


def test_data_is_small_and_free_of_trademarks(data: CalibrationData) -> None:
    files = list(DEFAULT_DATA.glob("*.jsonl"))
    assert sum(file.stat().st_size for file in files) < 3_000_000
    assert not [file for file in files if "gutenberg" in file.read_text().lower()]


@pytest.mark.skipif(not CONFIGS, reason="no configuration is shipped yet")
def test_every_known_model_has_every_threshold() -> None:
    found = sorted((CalibrationFile.load(p) for p in CONFIGS), key=lambda f: f.fingerprint)
    for _, files in groupby(found, key=lambda f: f.fingerprint):
        ordered = sorted(files, key=lambda f: f.threshold)
        assert [f.threshold for f in ordered] == THRESHOLDS
        for phase in ("prefill", "decode"):
            kept = [np.mean(getattr(f, phase).keep_ratio) for f in ordered]
            assert (np.diff(kept) >= 0).all()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_found_and_says_what_it_keeps(path: Path, data: CalibrationData) -> None:
    found = CalibrationFile.load(path)
    identity = ModelIdentity(
        found.fingerprint, found.num_layers, found.num_kv_heads, found.head_dim
    )
    found.check(identity, path)
    assert load.shipped(identity, found.threshold) == path
    assert found.data_sha256 == data.sha256
    for budget in (found.prefill, found.decode):
        table = budget.table(found.block)
        np.testing.assert_allclose(table.keep_ratio, budget.keep_ratio, atol=1e-5)


@pytest.mark.skipif(not CONFIGS, reason="no configuration is shipped yet")
def test_budgets_can_be_scaled() -> None:
    found = CalibrationFile.load(CONFIGS[0])
    known = ModelIdentity(found.fingerprint, found.num_layers, found.num_kv_heads, found.head_dim)

    def loaded(**args: str) -> SparsitySettings:
        settings = load.load_settings(
            SparsityArgs(tca_threshold=found.threshold, **args), known, "m"
        )
        assert settings is not None
        return settings

    shipped, scaled = loaded(), loaded(tca_kept_ratio="0.39,0.25")
    for table, ratio in ((scaled.prefill, 0.39), (scaled.decode, 0.25)):
        assert table.keep_ratio.mean() == pytest.approx(ratio, abs=1e-3)
    # Who gets more of it stays as calibrated.
    order = np.argsort(shipped.decode.mu, axis=None)
    assert (np.diff(scaled.decode.mu.ravel()[order]) >= 0).all()
    both = loaded(tca_config="uniform:0.3", tca_kept_ratio="0.2")
    assert both.prefill.keep_ratio.mean() == pytest.approx(0.2, abs=1e-3)
    for wrong in ("1.5", "0.001", "much", "0.1,0.2,0.3", "0.3,"):
        with pytest.raises(ConfigurationError, match=r"--tca-kept-ratio"):
            loaded(tca_kept_ratio=wrong)


@pytest.mark.skipif(not CONFIGS, reason="no configuration is shipped yet")
def test_a_threshold_that_a_known_model_has_not_is_refused_with_those_it_has() -> None:
    found = CalibrationFile.load(CONFIGS[0])
    known = ModelIdentity(found.fingerprint, found.num_layers, found.num_kv_heads, found.head_dim)
    with pytest.raises(ConfigurationError, match=r"--tca-threshold 0.7.* 0.6, 0.8, 0.9, 0.95$"):
        load.load_settings(SparsityArgs(tca_threshold=0.7), known, "m")
    other = ModelIdentity("unknown", found.num_layers, found.num_kv_heads, found.head_dim)
    assert load.load_settings(SparsityArgs(tca_threshold=0.7), other, "m") is None
    assert load.load_settings(SparsityArgs(tca_threshold=0.7, disable_tca=True), known, "m") is None
