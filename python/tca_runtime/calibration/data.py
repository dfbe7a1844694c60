"""Prompts to calibrate with."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
# Texts of this kind read alike from anywhere; all others end with what they lead up to.
BOOK = "book"


class DataError(ValueError):
    """Calibration data that cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True)
class CalibrationData:
    """Texts by kind, and a hash of the files they came from."""

    texts: dict[str, list[str]]
    sha256: str

    @staticmethod
    def load(path: Path) -> CalibrationData:
        """Read a JSONL file, or all of a directory: one ``{"kind": ..., "text": ...}`` a line.

        Raises
        ------
        DataError
            When there is none or a line is something else.
        """
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        texts: dict[str, list[str]] = {}
        digest = hashlib.sha256()
        for file in files:
            try:
                content = file.read_bytes()
            except OSError as error:
                raise DataError(f"cannot read the calibration data {file}: {error}") from error
            digest.update(content)
            for number, line in enumerate(content.splitlines(), 1):
                kind, text = _parse(line, f"{file}:{number}")
                texts.setdefault(kind, []).append(text)
        if not texts:
            raise DataError(f"no calibration data in {path}: expected JSONL files there")
        return CalibrationData(texts, digest.hexdigest())

    def samples(
        self, encode: Callable[[str], list[int]], count: int, length: int, seed: int
    ) -> list[Tokens]:
        """Prompts of at most ``length`` tokens, the kinds in turn.

        Book texts give a random stretch. Of other texts the last tokens are taken, because they
        end with a question or an answer about what came before.
        """
        rng = random.Random(seed)
        kinds = sorted(self.texts)
        streams = [itertools.cycle(rng.sample(self.texts[k], len(self.texts[k]))) for k in kinds]
        chosen = []
        for kind, stream in itertools.islice(
            itertools.cycle(zip(kinds, streams, strict=True)), count
        ):
            ids = np.array(encode(next(stream)), dtype=np.int32)
            spare = max(0, len(ids) - length)
            begin = rng.randint(0, spare) if kind == BOOK else spare
            chosen.append(ids[begin : begin + length])
        return chosen


def _parse(line: bytes, where: str) -> tuple[str, str]:
    try:
        item = json.loads(line)
        kind, text = item["kind"], item["text"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f'{where}: expected {{"kind": ..., "text": ...}}') from None
    if not isinstance(kind, str) or not isinstance(text, str):
        raise DataError(f"{where}: kind and text must be strings")
    return kind, text
