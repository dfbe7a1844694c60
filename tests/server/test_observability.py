"""What an operator sees: metrics and their dashboard, load reports, log lines."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tca_runtime.cache.manager import CacheUsage
from tca_runtime.config import ServerArgs
from tca_runtime.logs import JsonFormatter, TextFormatter, configure_logging
from tca_runtime.server.loads import SECTIONS
from tca_runtime.server.metrics import STAGES, TokenGaps
from tca_runtime.server.replies import Load
from tests.server.fake_scheduler import STATE
from tests.server.harness import MODEL, Server, eventually, running_server
from tests.server.test_auth import HELLO
from tests.server.test_native import script

DASHBOARD = Path(__file__).parents[2] / "examples" / "monitoring" / "grafana-dashboard.json"
# Suffixes that a family's samples have.
SUFFIXES = ("_total", "_bucket", "_sum", "_count", "_created")
# As they stand in SGLang 0.5.23; a dashboard made for it must find them here.
SGLANG_NAMES = {
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "sglang:num_grammar_queue_reqs",
    "sglang:num_used_tokens",
    "sglang:max_total_num_tokens",
    "sglang:token_usage",
    "sglang:gen_throughput",
    "sglang:cache_hit_rate",
    "sglang:utilization",
    "sglang:num_retracted_requests_total",
    "sglang:num_requests_total",
    "sglang:num_aborted_requests_total",
    "sglang:prompt_tokens_total",
    "sglang:cached_tokens_total",
    "sglang:generation_tokens_total",
    "sglang:time_to_first_token_seconds_bucket",
    "sglang:inter_token_latency_seconds_bucket",
    "sglang:e2e_request_latency_seconds_bucket",
    "sglang:queue_time_seconds_bucket",
    "sglang:per_stage_req_latency_seconds_bucket",
}


def samples(server: Server) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def total(found: dict[str, list[Any]], name: str, **labels: str) -> float:
    wanted = labels.items()
    return sum(s.value for s in found.get(name, []) if wanted <= s.labels.items())


@pytest.fixture
def used_server(server: Server) -> Server:
    """With a request that was answered and one that failed, so that every series exists."""
    report = {"kept_ratio": 0.39, "dropped_mass": 0.02}
    server.generate(text="hello", sampling_params=script(tca=report))
    server.post("/generate", {"text": "a", "sampling_params": script(error=[503, "full"])})
    eventually(lambda: bool(server.manager.scheduler_state))
    return server


def test_names_are_sglangs_where_the_meaning_is_the_same(used_server: Server) -> None:
    found = samples(used_server)
    assert set(found) >= SGLANG_NAMES
    ours = {name for name in found if name.startswith("sglang:")}
    known = SGLANG_NAMES | {n.removesuffix("_bucket") + s for n in SGLANG_NAMES for s in SUFFIXES}
    created = {n.removesuffix("_total") + "_created" for n in SGLANG_NAMES}
    assert ours <= known | created
    assert all(s.labels["model_name"] == MODEL for series in found.values() for s in series)


def test_the_caches_counters_are_the_schedulers(used_server: Server) -> None:
    found = samples(used_server)
    for name, value in STATE["reclaimed_slots"].items():
        assert total(found, f"tca:{name}_slots_total") == value
    for name, value in STATE["kv_cache"].items():
        assert total(found, f"tca:kv_cache_{name}") == value
    assert total(found, "sglang:num_retracted_requests_total") == STATE["num_retractions"]
    assert total(found, "tca:step_seconds_total") == STATE["step_seconds_total"]


def test_tokens_told_together_share_the_time_they_took() -> None:
    gaps = TokenGaps()
    gaps.observe(0.025, 3)
    gaps.observe(400.0, 2)
    values = {
        (s.name[len(gaps.collect(MODEL).name) :], s.labels.get("le")): s.value
        for s in gaps.collect(MODEL).samples
    }
    assert values["_bucket", "0.01"] == 0
    assert values["_bucket", "0.025"] == values["_bucket", "300.0"] == 3
    assert values["_bucket", "+Inf"] == values["_count", None] == 5
    assert values["_sum", None] == pytest.approx(800.075)


def test_selection_and_phases_are_counted_per_request(used_server: Server) -> None:
    before = samples(used_server)
    report = {"kept_ratio": 0.25, "dropped_mass": 0.5}
    reply = used_server.generate(text="hello", sampling_params=script(tca=report))
    used_server.post("/generate", {"text": "a", "sampling_params": script(error=[503, "full"])})
    after = samples(used_server)

    def change(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert change("tca:kept_ratio_sum") == pytest.approx(0.25)
    assert change("tca:dropped_mass_sum") == pytest.approx(0.5)
    assert change("tca:refused_requests_total", status="503") == 1
    name = "sglang:per_stage_req_latency_seconds"
    assert change(f"{name}_count", stage="decode") == change(f"{name}_count", stage="prefill") == 1
    assert change(f"{name}_count", stage="queue") == change(f"{name}_count", stage="tokenize") == 2
    assert {s.labels["stage"] for s in after[f"{name}_count"]} == set(STAGES)
    stages = sum(change(f"{name}_sum", stage=stage) for stage in STAGES)
    latencies = change("sglang:e2e_request_latency_seconds_sum")
    assert latencies >= reply["meta_info"]["e2e_latency"]
    assert stages <= latencies + 0.01


CHAT = "/v1/chat/completions"
REFUSED: list[tuple[int, str, dict[str, Any]]] = [
    (400, "/generate", {"text": 5}),
    (400, "/generate", {"text": "a", "sampling_params": {"temperature": -1}}),
    (400, "/generate", {"text": ["a", "b"], "sampling_params": script(error=[400, "no"])}),
    (400, CHAT, {"messages": [{"role": "user", "content": 5}]}),
    (400, CHAT, {"messages": HELLO, "chat_template_kwargs": {"tokenize": 1}}),
    (503, CHAT, {"messages": HELLO, "stream": True, **script(error=[503, "full"])}),
    (413, "/generate", {"text": "x" * 3000}),
    (404, "/nowhere", {}),
    (405, "/health", {}),
]


def refusals(server: Server) -> dict[str, float]:
    found = samples(server).get("tca:refused_requests_total", [])
    return {s.labels["status"]: s.value for s in found}


@pytest.mark.parametrize(("status", "path", "body"), REFUSED)
def test_every_refusal_is_counted_once(status: int, path: str, body: dict[str, Any]) -> None:
    with running_server(max_body_bytes=2000) as server:
        assert server.post(path, body).status_code == status
        assert refusals(server) == {str(status): 1}


def test_refusals_of_keys_of_a_server_that_ends_and_of_a_crash_are_counted() -> None:
    with running_server(api_key="key") as server:
        key = {"Authorization": "Bearer key"}
        assert server.post("/generate", {"text": "a"}).status_code == 401
        server.manager.chat_template = None  # type: ignore[assignment]
        assert server.post(CHAT, {"messages": HELLO}, headers=key).status_code == 500
        server.manager.draining = True
        assert server.post("/generate", {"text": "a"}, headers=key).status_code == 503
        assert refusals(server) == {"401": 1, "500": 1, "503": 1}


def test_a_stream_that_breaks_off_is_counted_once_and_an_abort_is_none(
    own_server: Server,
) -> None:
    params = script(answer="hello " * 100, delay=0.01, max_new_tokens=400)
    body = {"text": "a", "rid": "r", "stream": True, "sampling_params": params}
    with own_server.post("/generate", body, stream=True) as stream:
        lines = stream.iter_lines()
        next(lines)
        own_server.post("/abort_request", {"rid": "r"})
        assert b"data: [DONE]" in list(lines)
    assert refusals(own_server) == {}
    with own_server.post("/generate", {**body, "text": ["a", "b"]}, stream=True) as stream:
        lines = stream.iter_lines()
        next(lines)
        own_server.scheduler.die("KeyError: 3")
        assert any(b'"code":503' in line for line in lines)
    assert refusals(own_server) == {"503": 1}
    assert own_server.post("/generate", {"text": "a"}).status_code == 503
    assert refusals(own_server) == {"503": 2}


def test_every_panel_of_the_dashboard_shows_metrics_that_exist(used_server: Server) -> None:
    found = samples(used_server)
    dashboard = json.loads(DASHBOARD.read_text())
    used: set[str] = set()
    for panel in dashboard["panels"]:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            names = re.findall(r"(?:sglang|tca):\w+", target["expr"])
            assert names, target
            for name in names:
                # The fake scheduler reports part of the cache's figures.
                known = name in found or name.startswith("tca:kv_cache_")
                assert known, f"{panel['title']}: {name}"
            used.update(names)
    cells = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(cells)) == len(cells)
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    kept = ("kept_ratio", "dropped_mass", "pruned_slots_total", "evicted_slots_total")
    assert shown >= {f"tca:{name}" for name in kept}


def test_the_cache_figures_of_the_dashboard_exist() -> None:
    text = DASHBOARD.read_text()
    names = set(re.findall(r"tca:kv_cache_(\w+)", text))
    assert names and names <= set(CacheUsage.__dataclass_fields__)


def test_loads_are_complete(used_server: Server) -> None:
    loads = used_server.get("/v1/loads").json()
    (load,) = loads["loads"]
    assert set(load) == set(Load.__struct_fields__)
    assert load["num_total_tokens"] == load["num_used_tokens"] + 7
    assert load["utilization"] == 2 / 64
    assert load["queues"] == {"waiting": 1, "grammar": 0, "paused": 0, "retracted": 0}
    assert "memory" not in used_server.get("/v1/loads?include=core").json()["loads"][0]
    assert used_server.get("/v1/loads?dp_rank=1").json()["loads"] == []
    for bad in ("include=cores", "format=xml", "dp_rank=a"):
        response = used_server.get(f"/v1/loads?{bad}")
        assert response.status_code == 400 and bad.split("=")[0] in response.json()["message"]
    for section in SECTIONS:
        assert used_server.get(f"/v1/loads?include={section}").status_code == 200
    text = used_server.get("/v1/loads?format=prometheus").text
    values = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert values["sglang:num_running_reqs"] == 2


def record(message: str, **fields: Any) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "n", "msg": message, "levelname": "INFO"})
    made.fields = fields
    return made


def test_text_lines_cannot_be_forged() -> None:
    line = TextFormatter("server").format(record("request ended", rid="a\nERROR x=1", seconds=0.5))
    assert "\n" not in line
    assert line.endswith('request ended rid="a\\nERROR x=1" seconds=0.5')


def test_json_lines_have_fields_levels_and_tracebacks() -> None:
    formatter = JsonFormatter("scheduler")
    entry = json.loads(formatter.format(record("request ended", rid="a\nb")))
    assert (entry["message"], entry["level"], entry["rid"]) == ("request ended", "info", "a\nb")
    assert entry["process"] == "scheduler" and entry["logger"] == "n" and entry["time"]
    try:
        raise KeyError("lost")
    except KeyError as error:
        failed = record("broken")
        failed.exc_info = (type(error), error, error.__traceback__)
    assert "KeyError" in json.loads(formatter.format(failed))["traceback"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_every_request_is_logged_once_with_its_id(
    server: Server, capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        configure_logging(ServerArgs(log_format=log_format), "server")
        server.generate(text="hello", rid="good")
        failing = {"text": "a", "rid": "bad", "sampling_params": script(error=[503, "full"])}
        server.post("/generate", failing)
    finally:
        root.handlers, root.level = before, level
    good, bad = [line for line in capsys.readouterr().err.splitlines() if "request ended" in line]
    if log_format == "text":
        assert " INFO " in good and " rid=good finish=stop " in good
        assert " WARNING " in bad and bad.endswith(" status=503 reason=full")
        return
    entry = json.loads(good)
    assert (entry["level"], entry["rid"], entry["finish"]) == ("info", "good", "stop")
    assert entry["number"] == server.scheduler.received[-2].rid
    assert entry["completion_tokens"] > 1 and entry["seconds"] > 0
    entry = json.loads(bad)
    assert (entry["level"], entry["rid"], entry["status"]) == ("warning", "bad", 503)
