"""Texts that need no network, and a tiny random model in a lab."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmark.quality import lab, sources
from benchmark.quality.ruler import niah, word_counts
from benchmark.quality.sources import Document
from tca_runtime.models.loader import LoadedModel
from tca_runtime.tokenizer.byte_tokenizer import byte_tokenizer
from tests.gpu.tiny import write_model


def invented_words(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(rng.choices(letters, k=rng.randint(4, 9))) for _ in range(count)]


def invented_documents(count: int) -> list[Document]:
    rng = random.Random(5)
    documents = []
    for number in range(count):
        words = invented_words(45, rng.randrange(10**9))
        text = f"The key of place {number} is K{number:04d}. " + " ".join(words) + ". The end."
        asked = (f"What is the key of place {number}?", (f"K{number:04d}", f"key {number}"))
        documents.append(Document(f"Title {number // 5}", text, (asked,)))
    return documents


@pytest.fixture(autouse=True)
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test downloads anything."""
    prose = " ".join(
        word + "." if i % 9 == 8 else word for i, word in enumerate(invented_words(4000, 1))
    )
    documents = invented_documents(150)
    by_kind = {"noun": 2, "adjective": 3, "verb": 4}
    monkeypatch.setattr(sources, "essays", lambda: prose)
    monkeypatch.setattr(sources, "squad", lambda: documents)
    monkeypatch.setattr(sources, "words", lambda kind: invented_words(900, by_kind[kind]))
    for cached in (niah.essay_words, niah._nouns_and_adjectives, word_counts._vocabulary):
        cached.cache_clear()


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path: Path = write_model(tmp_path_factory.mktemp("tiny") / "model")
    return lab.load(str(path), "cpu")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()
