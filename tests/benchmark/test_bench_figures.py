import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmark import bench_cpu_vs_transformers as cpu
from benchmark import bench_prefix_cache, bench_radix_tree, figures
from benchmark.server_process import RunningServer
from benchmark.serving.metrics import RequestResult
from tests.benchmark.fake_server import FakeServer


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return tmp_path


def serve_with(monkeypatch: pytest.MonkeyPatch, servers: Sequence[FakeServer]) -> list[list[str]]:
    """Hand out ``servers`` one after another; returns the flags they were started with."""
    waiting = iter(servers)
    started: list[list[str]] = []

    @contextmanager
    def running(flags: Sequence[str]) -> Iterator[RunningServer]:
        started.append(list(flags))
        with next(waiting) as server:
            yield RunningServer(server.url, 0)

    monkeypatch.setattr(bench_prefix_cache, "running_server", running)
    return started


def saved(directory: Path, name: str) -> dict[str, dict[str, Any]]:
    document = json.loads((directory / f"{name}.json").read_text())
    return {figure["name"]: figure for figure in document["figures"]}


def test_figures_judge_both_senses() -> None:
    good = figures.Figure("a", 2.0, "x", "at least", 1.5)
    exact = figures.Figure("b", 0.0, "tokens", "at most", 0.0)
    bad = figures.Figure("c", 5.1, "ms", "at most", 5.0)
    shown = figures.Figure("d", 1.0, "s")
    assert [f.passed for f in (good, exact, bad, shown)] == [True, True, False, None]
    assert figures.all_passed([good, exact, shown])
    assert not figures.all_passed([good, bad])
    lines = figures.format_figures([good, bad, shown]).splitlines()
    assert [("PASS" in line, "FAIL" in line) for line in lines] == [
        (True, False),
        (False, True),
        (False, False),
    ]


def test_second_turn_is_measured(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    serve_with(monkeypatch, [server])
    bench_prefix_cache.main(["--rounds", "2", "--prompt-words", "50"])
    got = saved(results, "prefix_cache")
    assert got["tokens of turn one computed again, at most"]["value"] == 0
    assert got["cached after a flush"]["value"] == 0
    assert server.flushes == 2 * 3, "before each chat and before each cold prompt, warm-up included"


def test_recomputed_tokens() -> None:
    chat = bench_prefix_cache.Round(
        first_prompt=100,
        first_reply=20,
        second_prompt=150,
        cached=117,
        cold_cached=0,
        warm_s=0.1,
        cold_s=1.0,
    )
    assert chat.recomputed == 3


@pytest.mark.parametrize(("first_id", "status"), [(0, 0), (1, 1)])
def test_equality_counts_differing_tokens(
    results: Path, monkeypatch: pytest.MonkeyPatch, first_id: int, status: int
) -> None:
    servers = [FakeServer(caching=False), FakeServer(first_id=first_id)]
    started = serve_with(monkeypatch, servers)
    args = ["--equality", "--synthetic", "--conversations", "2", "--max-tokens", "4"]
    assert bench_prefix_cache.main(args) == status
    got = saved(results, "prefix_cache_equality")
    assert got["output tokens compared"]["value"] == 2 * 3 * 4
    assert got["tokens that differ"]["value"] == 2 * 3 * 4 * first_id
    assert ["--disable-radix-cache" in flags for flags in started] == [True, False]
    assert [b["text"] for b in servers[0].bodies] == [b["text"] for b in servers[1].bodies]


def test_equality_without_reuse_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with(monkeypatch, [FakeServer(caching=False), FakeServer(caching=False)])
    args = ["--equality", "--synthetic", "--conversations", "1", "--max-tokens", "2"]
    assert bench_prefix_cache.main(args) == 1


def test_differing_tokens_counts_missing_ones() -> None:
    def answer(*ids: int) -> bench_prefix_cache.Answer:
        return bench_prefix_cache.Answer("", ids, 0)

    assert bench_prefix_cache.differing_tokens(answer(1, 2, 3), answer(1, 2, 3)) == 0
    assert bench_prefix_cache.differing_tokens(answer(1, 2, 3), answer(1, 9, 3, 4)) == 2


def test_speeds_of_both_sides() -> None:
    results = [
        RequestResult(start=0.0, end=4.0, text_times=(2.0, 4.0), completion_tokens=5),
        RequestResult(start=1.0, end=5.0, text_times=(3.0, 5.0), completion_tokens=5),
    ]
    answers = [
        {"seconds": 4.0, "token_times": [2.0, 2.5, 3.0, 3.5, 4.0]},
        {"seconds": 6.0, "token_times": [2.0, 3.0, 4.0, 5.0, 6.0]},
    ]
    decode = cpu.Case("", "decode", 1.0, requests=1, prompt_tokens=100, new_tokens=5)
    output = cpu.Case("", "output", 1.0, requests=2, prompt_tokens=100, new_tokens=5)
    prefill = cpu.Case("", "prefill", 1.0, requests=1, prompt_tokens=100, new_tokens=1)
    assert cpu.our_speed(decode, results[:1]) == pytest.approx(4 / 2.0)
    assert cpu.their_speed(decode, answers[:1]) == pytest.approx(4 / 2.0)
    assert cpu.our_speed(output, results) == pytest.approx(10 / 5.0)
    assert cpu.their_speed(output, answers) == pytest.approx(10 / 10.0)
    assert cpu.our_speed(prefill, results[:1]) == pytest.approx(100 / 4.0)
    assert cpu.their_speed(prefill, answers[:1]) == pytest.approx(100 / 4.0)


def test_ratio_is_of_medians_against_the_faster_baseline() -> None:
    case = cpu.Case("x", "decode", 1.5, requests=1, prompt_tokens=1, new_tokens=2)
    speeds = [(10.0, 5.0, 4.0), (30.0, 6.0, 50.0), (20.0, 40.0, 5.5)]
    samples = [cpu.Sample(a, {"b": b, "c": c}, 1.0, 0.0) for a, b, c in speeds]
    *_, b, c, ratio = cpu.case_figures(case, samples)
    assert (b.value, c.value) == (6.0, 5.5)
    assert ratio.value == pytest.approx(20 / 6)
    assert ratio.passed
    assert "0.50..5.00" in ratio.detail


def test_radix_tree_benchmark_runs(results: Path) -> None:
    bench_radix_tree.main(["--nodes", "400", "--queries", "50", "--rows", "2"])
    got = saved(results, "radix_tree")
    assert all(figure["value"] > 0 for figure in got.values())
