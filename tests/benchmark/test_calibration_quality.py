"""Prompts, teacher forcing and statistics of the calibration and needle benchmarks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark import bench_calibration, bench_needles
from benchmark.bench_calibration import Contender, divergence
from benchmark.in_process import InProcessServer
from benchmark.intervals import bootstrap_mean, bootstrap_ratio, wilson
from benchmark.long_prompts import BOOKS, BooksError, books, document, make_prompts, paragraphs
from benchmark.teacher_forcing import TeacherForcing
from tca_runtime.attention.triton_backend import TritonBackend
from tca_runtime.calibration.grid import Grid
from tca_runtime.calibration.observer import Totals
from tca_runtime.config import CacheArgs, ModelArgs, RuntimeConfig, SchedulerArgs, SparsityArgs
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.settings import SparsitySettings
from tca_runtime.tokenizer.byte_tokenizer import byte_tokenizer
from tests.gpu.tiny import write_model


def count(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Books of random words, one paragraph of about 60 words each."""
    path = tmp_path_factory.mktemp("books")
    rng = random.Random(0)
    for name in BOOKS:
        pages = [" ".join(f"{name[0]}{rng.randrange(10**6)}" for _ in range(60)) for _ in range(90)]
        (path / f"{name}.txt").write_text("TITLE\n\n" + "\n\n".join(pages))
    return path


def test_wilson_and_bootstrap_intervals() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    low, high = bootstrap_mean(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap_ratio(2 * values, values) == pytest.approx((2.0, 2.0))


def test_divergence_of_distributions() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    kl, same = divergence(p, q)
    assert kl == pytest.approx(0.5 * (0.5 * np.log(2) + 0.5 * np.log(2 / 3)), abs=1e-6)
    assert same == 0.5


def test_prompts_hold_their_answers(shelf: Path) -> None:
    sources = books(shelf)
    made = make_prompts(sources, 9, (700, 900), count, seed=3)
    assert [p.kind for p in made[:3]] == ["retrieval", "multi-turn", "book"]
    for prompt in made:
        assert 400 < count(prompt.context) <= 1100
        if prompt.kind != "book":
            assert prompt.answer in prompt.context and prompt.check in prompt.answer
    assert make_prompts(sources, 4, (700, 900), count, seed=3) == made[:4]
    assert make_prompts(sources, 4, (700, 900), count, seed=4) != made[:4]


def test_documents_have_facts_at_all_depths(shelf: Path) -> None:
    text, facts = document(random.Random(1), books(shelf)[0], 1500, count, 8)
    places = [text.index(sentence) / len(text) for sentence, _, _ in facts]
    assert places == sorted(places) and places[0] < 0.15 and places[-1] > 0.8
    assert all(value in sentence for sentence, _, value in facts)
    assert count(text) <= 1500


def test_missing_books_are_named(tmp_path: Path) -> None:
    with pytest.raises(BooksError, match="cannot read the books in"):
        books(tmp_path)
    assert paragraphs("short\n\n" + "a b " * 80 + "\r\n") == [" ".join(["a", "b"] * 80)]


@pytest.mark.parametrize("text", ["uniform", "mass", "output-error", "output-error:0.5"])
def test_contenders_keep_the_same_share(text: str) -> None:
    grid = Grid.build(64)
    totals = Totals.zeros(3, 2, grid)
    steepness = np.random.default_rng(0).uniform(0.5, 8, (2, 3, 2, 1))
    totals.mass[:] = grid.ratio ** (1 / steepness)
    totals.error[:] = (1 - grid.ratio) ** steepness
    totals.chunks[:] = 1
    contender = Contender.parse(text)
    assert str(contender) == text
    table = contender.table(totals, grid, 1, 0.25)
    assert table.keep_ratio.mean() == pytest.approx(0.25, abs=1e-6)
    spread = np.ptp(table.keep_ratio)
    assert spread < 1e-9 if text == "uniform" else spread > 0.05
    if text.endswith("0.5"):
        assert table.keep_ratio.min() > 0.1


def settings(ratio: float) -> SparsitySettings:
    table = BudgetTable.uniform(ratio, 3, 2)
    return SparsitySettings(
        TCAPolicy(), table, table, window=64, min_candidates=128, granularity=256
    )


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_teacher_forcing_repeats_what_the_server_generates(
    tmp_path: Path, ratio: float, backend: str
) -> None:
    model = ModelArgs(model_path=str(write_model(tmp_path / "m")), device="cpu")
    prompt = np.random.default_rng(0).integers(0, 256, 900).astype(np.int32)
    server = InProcessServer(
        RuntimeConfig(
            model=model,
            cache=CacheArgs(max_total_tokens=2000),
            scheduler=SchedulerArgs(chunked_prefill_size=256),
            sparsity=SparsityArgs(
                tca_config=f"uniform:{ratio}",
                tca_window=64,
                tca_tail=0,
                tca_min_candidates=128,
                host_cache_size=0,
            ),
        )
    )
    answer = server.ask([prompt.tolist()], 12)[0]
    forcing = TeacherForcing(model, 1000)
    if backend == "cuda":
        # Its layout of the work, with the kernels' references.
        forcing.engine.backend = TritonBackend(forcing.engine.shape, forcing.engine.cache.pool.kv)
    wanted = settings(ratio)
    computed = forcing.prefill(prompt, len(answer.token_ids), wanted)
    view = computed.decode_view(wanted.decode)
    assert view is not None
    given = np.array(answer.token_ids, dtype=np.int32)
    after = forcing.log_probs(computed, given, view)
    best = torch.cat([computed.next_token, after[:-1]]).argmax(-1)
    assert best.tolist() == answer.token_ids
    # Continuations leave the prompt as it was.
    assert torch.equal(forcing.log_probs(computed, given, view), after)
    everything = forcing.log_probs(computed, given, None)
    assert torch.allclose(everything, after, atol=1e-4) == (ratio == 1.0)
    forcing.release(computed)
    assert forcing.engine.cache.usage().running_slots == 0


def row(document: int, mode: str, right: bool, **more: object) -> dict[str, object]:
    base = {"document": document, "question": 0, "mode": mode, "right": right, "answer": str(right)}
    return {**base, "prompt_tokens": 100, "cached_tokens": 90, **more}


def test_needle_figures_pair_answers() -> None:
    full = [row(i, bench_needles.FULL, i < 8) for i in range(10)]
    tca = [row(i, "tca", i < 6, kept_ratio=0.3, dropped_mass=0.1) for i in range(10)]
    counts = {"demoted": 5, "promoted": 4, "pruned": 3, "evicted": 0}
    measured = {
        "one-user": [*full, *tca],
        "full-second": full,
        "pressure": [{**r, **counts} for r in tca],
        "memory": [
            row(
                0,
                "tca",
                True,
                tree_slots=45,
                full_equivalent_slots=100,
                candidate_share=0.39,
                window_share=0.03,
            )
        ],
    }
    found = {f.name: f for f in bench_needles.figures_of(measured)}  # type: ignore[arg-type]
    assert found["one-user: full attention"].value == 80
    assert found["one-user: tca"].value == 60
    assert found["one-user: only full attention right"].value == 2
    assert found["one-user: kept"].value == pytest.approx(30)
    assert found["pressure: prompt found in the cache"].value == pytest.approx(90)
    assert "pruned 3" in found["pressure: prompt found in the cache"].detail
    assert found["memory: slots held / full cache"].passed is False


def test_calibration_figures_compare_with_the_baseline() -> None:
    def result(kl: float) -> dict[str, object]:
        rows = [["decode", "uniform", 0.1, kl, 1.0], ["decode", "mass", 0.1, kl / 2, 0.5]]
        return {"rows": rows}

    found = list(bench_calibration.figures_of([result(0.2), result(0.4)], "uniform"))
    by_name = {f.name: f for f in found}
    assert by_name["decode 10% uniform"].value == pytest.approx(0.3)
    assert "/uniform 0.50 [0.50, 0.50]" in by_name["decode 10% mass"].detail


@pytest.mark.slow
def test_every_needle_experiment_runs(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmark.figures.RESULTS", tmp_path)
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(bench_needles, "load_tokenizer", lambda args: tokenizer)
    flags = ["--model", str(write_model(tmp_path / "m")), "--device", "cpu", "--name", "tiny"]
    flags += ["--books", str(shelf), "--documents", "3", "--tokens", "2400", "--host-gib", "0.1"]
    flags += ["--tca-config", "uniform:0.15,0.28"]
    assert bench_needles.main(flags) == 0
    saved = json.loads((tmp_path / "needles_tiny.json").read_text())
    measured = saved["raw"]
    assert {name: len(rows) for name, rows in measured.items()} == {
        "full-second": 3,
        "one-user": 6,
        "two-users": 12,
        "pressure-host": 3,
        "pressure": 3,
        "memory": 3,
    }
    # A second question finds its document, whatever became of it in between.
    for name in ("pressure-host", "pressure"):
        assert all(row["cached_tokens"] > 2000 for row in measured[name])
    assert measured["pressure-host"][-1]["promoted"] > 0 == measured["pressure-host"][-1]["pruned"]
    assert measured["pressure"][-1]["pruned"] > 0
    # What is finished is not measured again.
    monkeypatch.setattr(bench_needles, "rows_of", None)
    assert bench_needles.main(flags) == 0
