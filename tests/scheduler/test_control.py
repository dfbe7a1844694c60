"""What the scheduler says about itself, and profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tca_runtime.config import CacheArgs, ModelArgs, RuntimeConfig, ServerArgs, SparsityArgs
from tca_runtime.engine.engine import Engine
from tca_runtime.messages import Control, ControlReply
from tca_runtime.scheduler.choices import choices
from tca_runtime.scheduler.control import ControlHandler
from tests.scheduler.fakes import Harness, expected_output
from tests.server.fake_scheduler import STATE


def ask(harness: Harness, action: Any, **args: Any) -> ControlReply:
    harness.mail.inbound.append(Control(call_id="c", action=action, args=args))
    harness.scheduler.run_once()
    replies = [m for m in harness.mail.outbound if isinstance(m, ControlReply)]
    return replies[-1]


def test_the_state_has_what_the_server_reads() -> None:
    state = Harness().scheduler.state()
    assert set(STATE) <= set(state)
    assert set(STATE["kv_cache"]) <= set(state["kv_cache"])
    assert set(STATE["reclaimed_slots"]) == set(state["reclaimed_slots"])


def test_waiting_tokens_are_those_that_must_be_computed() -> None:
    harness = Harness(capacity_tokens=200, max_running_requests=1)
    harness.submit("first", [1] * 30, 2)
    harness.run()
    harness.submit("busy", [2] * 10, 20)
    harness.scheduler.run_once()
    harness.submit("cached", [1] * 30, 2)
    harness.submit("new", [3] * 30, 2)
    harness.scheduler.run_once()
    state = harness.scheduler.state()
    assert state["num_waiting_reqs"] == 2
    assert state["num_waiting_uncached_tokens"] == 1 + 30
    harness.run()


def test_higher_priorities_are_admitted_first() -> None:
    harness = Harness(max_running_requests=1)
    harness.submit("busy", [9] * 5, 5)
    harness.scheduler.run_once()
    for priority in (0, 2, 1):
        harness.submit(f"p{priority}", [1 + priority] * 10, 3, priority=priority)
    harness.run()
    ended = [
        output.rid
        for message in harness.mail.outbound
        for output in getattr(message, "outputs", ())
        if output.finish is not None
    ]
    assert ended == ["busy", "p2", "p1", "p0"]


def test_queue_time_is_reported() -> None:
    harness = Harness()
    harness.submit("a", [1, 2, 3])
    harness.run()
    assert harness.outputs("a")[-1].queue_seconds >= 0.0


@pytest.fixture
def profiled(tmp_path: Path) -> Harness:
    harness = Harness()
    config = RuntimeConfig(server=ServerArgs(profile_dir=str(tmp_path)))
    engine: Any = harness.engine
    harness.scheduler._control = ControlHandler(harness.scheduler, engine, config)
    return harness


def test_a_profile_is_written(profiled: Harness, tmp_path: Path) -> None:
    assert not ask(profiled, "stop_profile").ok
    assert ask(profiled, "start_profile", output_dir="deep/er").ok
    assert "already" in ask(profiled, "start_profile").message
    profiled.submit("a", [1, 2, 3])
    profiled.run()
    reply = ask(profiled, "stop_profile")
    assert reply.ok
    path = Path(reply.payload["path"])
    assert path.parent == tmp_path / "deep" / "er"
    assert json.loads(path.read_text())["traceEvents"]


def test_a_profile_of_some_steps_ends_by_itself(profiled: Harness, tmp_path: Path) -> None:
    assert ask(profiled, "start_profile", num_steps=2).ok
    profiled.submit("a", [1, 2, 3])
    profiled.run()
    assert len(list(tmp_path.glob("trace-*.json"))) == 1
    assert not ask(profiled, "stop_profile").ok


class Unwilling(torch.profiler.profile):
    """Cannot write, as some versions say it."""

    def export_chrome_trace(self, path: str, use_python_export: bool = False) -> None:
        raise RuntimeError("no space left")


@pytest.mark.parametrize("how", ["missing directory", "error"])
@pytest.mark.parametrize("num_steps", [None, 2])
def test_a_trace_that_cannot_be_written_ends_nothing_but_its_recording(
    profiled: Harness,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
    num_steps: int | None,
) -> None:
    if how == "error":
        monkeypatch.setattr(torch.profiler, "profile", Unwilling)
    assert ask(profiled, "start_profile", output_dir="gone", num_steps=num_steps).ok
    if how == "missing directory":
        (tmp_path / "gone").rmdir()
    profiled.submit("a", [1, 2, 3])
    profiled.run()
    assert profiled.tokens("a") == expected_output([1, 2, 3], 5)
    reply = ask(profiled, "stop_profile")
    assert not reply.ok
    assert "cannot write" in (reply.message if num_steps is None else caplog.text)
    assert "no profile" in ask(profiled, "stop_profile").message
    monkeypatch.undo()
    assert ask(profiled, "start_profile").ok and ask(profiled, "stop_profile").ok


def test_a_profiler_that_does_not_start_is_no_recording(
    profiled: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("already in use")

    monkeypatch.setattr(torch.profiler.profile, "start", refuse)
    assert "already in use" in ask(profiled, "start_profile").message
    assert "no profile" in ask(profiled, "stop_profile").message


@pytest.mark.parametrize("directory", ["/tmp", "../elsewhere", "a/../../b"])
def test_a_profile_stays_below_its_directory(profiled: Harness, directory: str) -> None:
    reply = ask(profiled, "start_profile", output_dir=directory)
    assert not reply.ok and "--profile-dir" in reply.message


def test_choices_name_their_reason() -> None:
    config = RuntimeConfig(
        model=ModelArgs(load_format="dummy", model_config="tiny", device="cpu"),
        cache=CacheArgs(max_total_tokens=500),
        sparsity=SparsityArgs(tca_config="uniform:0.3", host_cache_size=0.0),
    )
    found = choices(config, Engine(config))
    assert found["device"] == ("cpu", "--device")
    assert found["KV pool"][0].startswith("500 tokens, 2000 slots")
    assert found["KV pool"][1] == "--max-total-tokens"
    assert found["host tier"] == ("off", "--host-cache-size 0")
    assert "keeps 30% in prefill" in found["selection"][0]
    assert found["selection"][1] == "uniform:0.3"
    assert found["retention"][0] == "on-pressure"
    assert all(value and reason for value, reason in found.values())
