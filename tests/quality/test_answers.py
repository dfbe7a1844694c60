"""Single prompts on a tiny model: configurations, shared prefills, and runs that go on."""

from __future__ import annotations

import argparse
import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmark.quality import answers, plan, samples
from benchmark.quality.answers import OutOfTime, batches, by_prefill, run_answers
from benchmark.quality.configurations import Configuration
from benchmark.quality.generate import ruler_samples
from benchmark.quality.lab import Ask, Lab
from benchmark.quality.records import Records, read
from benchmark.quality.samples import Sample
from tca_runtime.models.loader import LoadedModel
from tca_runtime.sparsity.policies.tca import TCAPolicy

TASKS = ["niah_single_1", "qa_squad"]
CONFIGS = Path(str(resources.files("tca_runtime.sparsity"))) / "configs"
SHIPPED_FILE = CONFIGS / "qwen2.5-coder-0.5b-0.95.json"
LABELS = {"model": "tiny", "data": "d"}


@pytest.fixture(scope="module")
def lab(loaded: LoadedModel) -> Lab:
    return Lab(loaded, tokens=20000)


@pytest.fixture
def prompts(tokenizer: Any) -> list[Sample]:
    found = list(ruler_samples(tokenizer, 3000, 1, 0, TASKS))
    return [msgspec.structs.replace(s, max_new_tokens=3) for s in found]


def parsed(*names: str) -> list[Configuration]:
    return [Configuration.parse(name) for name in names]


def test_names_say_all_of_a_configuration() -> None:
    (made,) = parsed("tca[score=mass] p15 d39 probes8 window256 every1024 mass5")
    assert made.prefill == 0.15 and made.decode == 0.39 and made.max_dropped_mass == 0.05
    settings = made.settings(2, 3)
    assert settings is not None
    assert settings.policy == TCAPolicy(score="mass")
    assert (settings.probes, settings.window, settings.granularity) == (8, 256, 1024)
    assert settings.prefill.keep_ratio.mean() == pytest.approx(0.15, abs=1e-3)
    assert settings.decode.keep_ratio.shape == (2, 3)


def test_names_of_what_happens_while_answers_are_written() -> None:
    plain, made = parsed("tca p15 k39", "tca p15 k39 tail512 refresh64 first16 latest8")
    settings = plain.at_length(4096).settings(2, 3)
    assert settings is not None and (settings.tail, settings.refresh_after(0)) == (0, 1024)
    settings = made.at_length(4096).settings(2, 3)
    assert settings is not None and (settings.tail, settings.refresh_probes) == (512, 8)
    assert [settings.refresh_after(n) for n in (0, 16, 32, 100)] == [16, 16, 32, 64]
    assert made.prefill_key == parsed("tca p15 k25 tail512")[0].prefill_key != plain.prefill_key


def test_calibrated_budgets_come_with_the_model() -> None:
    (made,) = parsed("tca p15 d39 calibrated")
    with pytest.raises(ValueError, match="without a calibration"):
        made.settings(24, 2)
    settings = made.settings(24, 2, SHIPPED_FILE)
    assert settings is not None
    assert settings.prefill.keep_ratio.mean() == pytest.approx(0.15, abs=1e-3)
    assert np.ptp(settings.decode.keep_ratio) > 0.1
    own, dense = parsed("tca d39 calibrated", "tca p100 d39 calibrated")
    assert own.prefill_key != dense.prefill_key == "dense"


@pytest.mark.parametrize("name", ["nothing d10", "tca d0", "tca p150", "tca what3", "tca d", ""])
def test_names_that_cannot_be_read(name: str) -> None:
    with pytest.raises(ValueError, match="configuration"):
        Configuration.parse(name)


def test_kept_counts_the_window() -> None:
    (made,) = parsed("tca p15 k39")
    assert made.at_length(4096).decode == pytest.approx((0.39 * 4096 - 512) / (4096 - 512))
    with pytest.raises(ValueError, match="window"):
        parsed("tca k10")[0].at_length(4096)


def test_prompts_are_shared_where_keys_and_values_are_equal() -> None:
    names = ["full", "tca p15 d39", "snapkv p100 d10", "tca p15 d10", "tca p15 d10 probes1"]
    order = [c.name for c in by_prefill(parsed(*names))]
    assert order == [names[0], names[2], names[1], names[3], names[4]]
    keys = [c.prefill_key for c in parsed(*names)]
    assert keys[0] == keys[2] and keys[1] == keys[3] and len(set(keys)) == 3


def test_batches_fit() -> None:
    made = [
        Sample(id=str(i), task="t", length=size, text="", answers=[["x"]], max_new_tokens=1)
        for i, size in enumerate([40, 70, 20, 50, 200])
    ]
    found = [[s.length for s in batch] for batch in batches(made, 100)]
    assert found == [[40], [70, 20], [50], [200]]


def test_answers_are_recorded_once(
    lab: Lab, prompts: list[Sample], tokenizer: Any, tmp_path: Path
) -> None:
    names = ["full", "tca p100 d30", "tca p30 d30"]
    records = Records(tmp_path / "r.jsonl")
    run_answers(lab, tokenizer, prompts, parsed(*names), records, LABELS)
    found = [r for r in read(tmp_path / "r.jsonl") if r["kind"] == "answer"]
    assert sorted((r["config"], r["sample"]) for r in found) == sorted(
        (name, s.id) for name in names for s in prompts
    )
    by_name = {r["config"]: r for r in found if r["sample"] == prompts[0].id}
    assert "kept" not in by_name["full"] and 0.3 < by_name["tca p100 d30"]["kept"] < 0.6
    # Dense prefill is computed once; a sparse one gives other K and V.
    assert by_name["full"]["cached"] == 0 == by_name["tca p30 d30"]["cached"]
    assert by_name["tca p100 d30"]["cached"] == by_name["full"]["prompt"] - 32
    again = Records(tmp_path / "r.jsonl")
    run_answers(lab, tokenizer, prompts, parsed(*names), again, LABELS)
    assert len(again.records) == len(records.records)


def test_a_run_that_was_cut_off_goes_on(
    lab: Lab,
    prompts: list[Sample],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "r.jsonl"
    both = parsed("full", "tca p100 d30")
    with pytest.raises(OutOfTime):
        run_answers(lab, tokenizer, prompts, both, Records(path), LABELS, time.monotonic() - 1)
    assert not path.exists()
    run_answers(lab, tokenizer, prompts, both[:1], Records(path), LABELS)
    # The last line was being written when the machine went away.
    text = path.read_text()
    lines = text.splitlines()
    assert json.loads(lines[-2])["sample"] == prompts[1].id
    path.write_text("\n".join([lines[0], lines[-2][:25]]))
    measured: list[str] = []
    measure = answers._measure

    def spy(lab: Lab, tokenizer: Any, missing: list[Sample], *rest: Any) -> Any:
        measured.extend(s.id for s in missing)
        return measure(lab, tokenizer, missing, *rest)

    monkeypatch.setattr(answers, "_measure", spy)
    run_answers(lab, tokenizer, prompts, both[:1], Records(path), LABELS)
    assert measured == [prompts[1].id]
    done = [r["sample"] for r in read(path) if r["kind"] == "answer"]
    assert sorted(done) == sorted(s.id for s in prompts)


def test_shipped_plans_can_be_read() -> None:
    paths = list(plan.PLANS.glob("*.json"))
    assert paths
    for path in paths:
        for stage in plan.read_plan(path):
            length = int(stage.data.rsplit("-", 1)[1])
            for configuration in stage.configurations:
                configuration.at_length(length).settings(24, 2, SHIPPED_FILE)


def test_a_plan_runs_within_its_time(
    loaded: LoadedModel,
    prompts: list[Sample],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples.write(tmp_path / "short.jsonl.xz", prompts)
    stages = [{"data": "short", "configurations": ["@two"], "limit": 1}]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"sets": {"two": ["full", "tca p100 d50"]}, "stages": stages}))
    monkeypatch.setattr(plan.lab, "load", lambda *args: loaded)
    monkeypatch.setattr(plan, "load_tokenizer", lambda args: tokenizer)
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    command = ["--plan", str(file), "--model", "m/tiny", "--data", str(tmp_path)]
    command += ["--output", str(tmp_path / "r.jsonl"), "--tokens", "6000"]
    plan.run(parser.parse_args([*command, "--minutes", "-1"]))
    assert [r["kind"] for r in read(tmp_path / "r.jsonl")] == ["run"]
    plan.run(parser.parse_args(command))
    found = [r for r in read(tmp_path / "r.jsonl") if r["kind"] == "answer"]
    assert [(r["model"], r["config"]) for r in found] == [
        ("tiny", "full"),
        ("tiny", "tca p100 d50"),
    ]
    # More processes than samples: this one has nothing to measure.
    plan.run(parser.parse_args([*command, "--part", "2/3"]))
    assert [r["kind"] for r in read(tmp_path / "r.jsonl")].count("answer") == 2


@pytest.mark.parametrize(
    "stage", [{"configurations": ["@none"]}, {"configurations": ["full"], "modes": ["none"]}]
)
def test_broken_plans(stage: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"sets": {}, "stages": [{"data": "d", **stage}]}))
    with pytest.raises(ValueError, match="none"):
        plan.read_plan(file)


def test_nothing_of_a_request_is_left_when_the_next_configuration_comes(lab: Lab) -> None:
    lab.use(Configuration.parse("full"))
    ask = Ask("a", list(range(1, 200)), 8)
    drawn = lab.generate([ask])["a"].ids
    # As on a GPU: the request ends unexpectedly, when one more step with it has been launched.
    lab.scheduler._overlap = True
    lab.scheduler._eos_ids = frozenset(drawn[:1])
    assert len(lab.generate([ask])["a"].ids) < len(drawn)
    assert not lab.engine.cache.usage().running_slots
    assert lab.scheduler.planner.is_idle
