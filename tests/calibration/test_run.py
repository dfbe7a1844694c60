"""A whole calibration of a small random model: files, resuming, refusals."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tca_runtime.calibrate import main
from tca_runtime.calibration.calibrator import CalibrationError, Calibrator
from tca_runtime.calibration.choose import Goal
from tca_runtime.calibration.data import CalibrationData, DataError, Tokens
from tca_runtime.calibration.observer import Totals
from tca_runtime.calibration.options import Options, parse_options
from tca_runtime.calibration.report import main as show
from tca_runtime.calibration.run import calibrate
from tca_runtime.config import ModelArgs, SparsityArgs
from tca_runtime.sparsity.load import load_settings
from tca_runtime.sparsity.settings import CalibrationFile, ConfigurationError, ModelIdentity
from tca_runtime.tokenizer.loading import load_tokenizer

LENGTH = 3200
TINY = ModelArgs(load_format="dummy", model_config="tiny", device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of text of bytes that differ from place to place."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rng = np.random.default_rng(0)
    items = []
    for kind in ("book", "chat"):
        text = " ".join(str(n) for n in rng.integers(0, 10**6, 800))
        items.append(json.dumps({"kind": kind, "text": text}))
    path.write_text("\n".join(items))
    return path


@pytest.fixture(scope="module")
def options(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    return Options(
        model=TINY,
        data=data,
        output=tmp_path_factory.mktemp("calibration") / "tiny.json",
        goals=(Goal(0.6), Goal(0.95)),
        samples=3,
        length=LENGTH,
        window=512,
        seed=1,
        resume=False,
    )


@pytest.fixture(scope="module")
def written(options: Options) -> list[Path]:
    return calibrate(options)


@pytest.fixture(scope="module")
def found(written: list[Path]) -> CalibrationFile:
    return CalibrationFile.load(written[1])


def identity_of(found: CalibrationFile) -> ModelIdentity:
    return ModelIdentity(found.fingerprint, found.num_layers, found.num_kv_heads, found.head_dim)


def test_one_pass_writes_a_file_and_a_heat_map_per_threshold(written: list[Path]) -> None:
    assert [path.name for path in written] == ["tiny-0.6.json", "tiny-0.95.json"]
    for path in written:
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    low, high = (CalibrationFile.load(path) for path in written)
    for phase in ("prefill", "decode"):
        less, more = (np.array(getattr(found, phase).keep_ratio) for found in (low, high))
        assert less.shape == (2, 2)
        assert (less < more).all()
        assert (np.array(getattr(high, phase).retained_mass) >= 0.95).all()


def test_server_loads_the_file(written: list[Path], found: CalibrationFile) -> None:
    args = SparsityArgs(tca_config=str(written[1]))
    settings = load_settings(args, identity_of(found), "tiny")
    assert settings is not None
    np.testing.assert_allclose(settings.decode.keep_ratio, found.decode.keep_ratio, atol=1e-5)
    np.testing.assert_allclose(settings.prefill.keep_ratio, found.prefill.keep_ratio, atol=1e-5)
    assert (settings.block, settings.window, settings.probes) == (64, 512, 32)


def test_a_smaller_window_must_keep_more_of_the_rest(
    options: Options, written: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "narrow.json"
    calibrate(replace(options, window=64, goals=options.goals[:1], output=path))
    wide, narrow = CalibrationFile.load(written[0]), CalibrationFile.load(path)
    settings = load_settings(SparsityArgs(tca_config=str(path)), identity_of(narrow), "tiny")
    assert settings is not None and settings.window == 64
    assert np.mean(narrow.decode.keep_ratio) > np.mean(wide.decode.keep_ratio)


def test_held_out_figures_are_of_the_last_samples(
    options: Options, written: list[Path], found: CalibrationFile
) -> None:
    calibrator = Calibrator(TINY, LENGTH)
    texts = CalibrationData.load(options.data)
    encode = load_tokenizer(TINY).encode
    last = calibrator.measure(texts.samples(encode, 3, LENGTH, options.seed)[-1])
    grid = calibrator.grid
    for phase, name in enumerate(("prefill", "decode")):
        ratio = np.array(getattr(found, name).keep_ratio)
        sigma = np.array(getattr(found, name).sigma)
        same = (grid.ratio == ratio[..., None].round(6)) | np.isclose(grid.ratio, ratio[..., None])
        index = (same & (grid.sigma == sigma[..., None])).argmax(-1)
        mass = np.take_along_axis(last.mass[phase], index[..., None], -1) / last.chunks[phase]
        figures = found.report["held_out"][name]
        assert figures["retained_mass"] == pytest.approx(mass.mean(), abs=1e-6)
        assert 0 < figures["output_error"] < 1


def test_resuming_measures_only_what_is_missing(
    options: Options, written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [path.read_bytes() for path in written]
    measured: list[int] = []
    measure = Calibrator.measure

    def counting(self: Calibrator, tokens: Tokens) -> Totals:
        measured.append(len(tokens))
        return measure(self, tokens)

    monkeypatch.setattr(Calibrator, "measure", counting)
    again = replace(options, resume=True)
    calibrate(again)
    assert measured == []
    samples = sorted(options.output.with_suffix(".samples").glob("*.npz"))
    assert len(samples) == 3
    samples[1].unlink()
    calibrate(again)
    assert measured == [LENGTH]
    assert [path.read_bytes() for path in written] == before
    calibrate(replace(again, seed=2, goals=(Goal(0.8),)))
    assert len(measured) > 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("fingerprint", "0" * 16), ("num_layers", 3), ("num_kv_heads", 4), ("head_dim", 64)],
)
def test_file_of_another_model_is_refused(
    found: CalibrationFile, field: str, value: object
) -> None:
    identity = replace(identity_of(found), **{field: value})
    with pytest.raises(ConfigurationError) as refused:
        found.check(identity, Path("c.json"))
    for part in ("c.json", field, str(value), str(getattr(found, field))):
        assert part in str(refused.value)


def test_file_with_another_block_size_is_refused(found: CalibrationFile) -> None:
    other = msgspec.structs.replace(found, block=32)
    with pytest.raises(ConfigurationError, match="c.json .*blocks of 32 tokens.* 64"):
        other.check(identity_of(found), Path("c.json"))


def test_prompts_that_are_too_short_are_refused(options: Options, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="more than 2048 tokens"):
        calibrate(replace(options, length=2048, samples=2, output=tmp_path / "short.json"))


def test_length_beyond_the_context_is_refused(options: Options) -> None:
    with pytest.raises(CalibrationError, match="--length 40000 .* 32768"):
        calibrate(replace(options, length=40_000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "book", "text": "x"}\n{"kind": 1, "text": "x"}', "t.jsonl:2.*strings"),
        ('{"text": "x"}', "t.jsonl:1.*expected"),
        ("no json", "t.jsonl:1.*expected"),
        ("", "no calibration data in .*t.jsonl"),
    ],
)
def test_bad_data_is_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        CalibrationData.load(file)


def test_missing_data_is_an_error_of_the_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.jsonl"
    flags = ["--model-path", "tiny", "--output", str(tmp_path / "c.json")]
    assert main([*flags, "--data", str(missing)]) == 1
    assert f"cannot read the calibration data {missing}" in capsys.readouterr().err


def test_samples_take_kinds_in_turn_and_ends_of_prompts() -> None:
    texts = {"book": ["b" * 50], "chat": ["c" * 30 + "end", "d" * 30 + "end"]}
    data = CalibrationData(texts, "")

    def encode(text: str) -> list[int]:
        return list(text.encode())

    samples = [bytes(s.astype(np.uint8)).decode() for s in data.samples(encode, 4, 10, 0)]
    assert [text[0] for text in samples[::2]] == ["b", "b"]
    assert all(text.endswith("end") for text in samples[1::2])
    assert {text[0] for text in samples[1::2]} == {"c", "d"}
    again = [bytes(s.astype(np.uint8)).decode() for s in data.samples(encode, 4, 10, 0)]
    assert samples == again


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "1.2"], "--threshold"),
        (["--samples", "1"], "--samples"),
        (["--objective", "mass", "--ratio", "0.4"], "--objective output-error"),
        (["--objective", "output-error", "--ratio", "x"], "--ratio x"),
        (["--floor", "0.1,0.2,0.3"], "--floor 0.1,0.2,0.3"),
        (["--objective", "output-error", "--ratio", "0.1", "--floor", "0.2"], "--floor"),
        (["--objective", "output-error", "--ratio", "0.1", "0.2"], "one for each threshold"),
    ],
)
def test_bad_flags_are_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--model-path", "m", "--output", "c.json", *flags])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_thresholds_and_phases_have_their_own_ratio() -> None:
    flags = ["--model-path", "m", "--output", "c.json", "--objective", "output-error"]
    both = parse_options([*flags, "--threshold", "0.8", "0.9", "--ratio", "0.1,0.4", "0.5"])
    assert [goal.ratios for goal in both.goals] == [(0.1, 0.4), (0.5, 0.5)]
    same = parse_options(
        [*flags, "--threshold", "0.8", "0.9", "--ratio", "0.3", "--floor", "0.05,0.2"]
    )
    assert [goal.ratios for goal in same.goals] == [(0.3, 0.3)] * 2
    assert [goal.floors for goal in same.goals] == [(0.05, 0.2)] * 2
    assert [goal.ratios for goal in parse_options(flags).goals] == [None]
    assert parse_options(flags[:4]).goals == (Goal(0.9, "output-error"),)


def test_heat_map_is_drawn_later_from_the_file(
    written: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    written[0].with_suffix(".png").unlink()
    assert show([str(written[0])]) == 0
    assert written[0].with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "threshold 0.6" in capsys.readouterr().out
    assert show([str(written[0].with_suffix(".png"))]) == 1
    assert "cannot read the TCA configuration" in capsys.readouterr().err


def test_missing_matplotlib_is_said_with_the_command(
    written: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert show([str(written[0])]) == 0
    assert f"calibration.report {written[0]}" in capsys.readouterr().out
