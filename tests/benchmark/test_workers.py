from pathlib import Path

import pytest

from benchmark.workers.pipe import WorkerError, running_worker


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def test_answers_are_not_mixed_with_what_libraries_print() -> None:
    with running_worker("tests.benchmark.echo_worker", [], timeout_s=60) as worker:
        assert worker.ask(number=1) == {"echo": {"number": 1}}
        assert worker.ask(text="zwei\n") == {"echo": {"text": "zwei\n"}}


def test_a_dead_worker_says_why() -> None:
    with (
        running_worker("tests.benchmark.echo_worker", [], timeout_s=60) as worker,
        pytest.raises(WorkerError, match="died on purpose"),
    ):
        worker.ask(die=True)
