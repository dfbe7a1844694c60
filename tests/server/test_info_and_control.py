"""Health, information, load, metrics, cache and profiling routes; the API key."""

from __future__ import annotations

import concurrent.futures

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fake_scheduler import CONTEXT_LENGTH, STATE
from tests.server.harness import MODEL, Server, eventually, running_server
from tests.server.test_native import script


def test_health(server: Server) -> None:
    assert server.get("/health").status_code == 200
    assert server.get("/health_generate").status_code == 200


def test_models(server: Server) -> None:
    listed = server.get("/v1/models").json()
    (card,) = listed["data"]
    assert listed["object"] == "list"
    assert set(card) == {"id", "object", "created", "owned_by", "root", "max_model_len"}
    assert (card["id"], card["max_model_len"]) == (MODEL, CONTEXT_LENGTH)
    assert server.get(f"/v1/models/{MODEL}").json() == card


@pytest.mark.parametrize("path", ["/get_model_info", "/model_info"])
def test_model_info(server: Server, path: str) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    info = server.get(path, headers=headers).json()
    assert info["model_path"] == "models/toy" and info["tokenizer_path"] == "models/toy"
    assert info["is_generation"] is True and info["architectures"] == ["ToyForCausalLM"]


@pytest.mark.parametrize("path", ["/get_server_info", "/server_info"])
def test_server_info(server: Server, path: str) -> None:
    info = server.get(path).json()
    assert info["served_model_name"] == MODEL and info["tp_size"] == info["dp_size"] == 1
    assert info["kv_cache"] == STATE["kv_cache"]
    assert info["context_length"] == CONTEXT_LENGTH
    assert info["max_running_requests"] == 64


def test_tree(server: Server) -> None:
    assert server.get("/tca/tree").json() == {"nodes": []}
    assert server.get("/tca/tree?limit=5").json() == {"nodes": [], "limit": 5}
    for wrong in ("0", "-1", "x", "1e3", "", "9" * 5000):
        response = server.get(f"/tca/tree?limit={wrong}")
        assert response.status_code == 400 and response.json()["param"] == "limit"


def test_load(server: Server) -> None:
    eventually(lambda: bool(server.manager.scheduler_state))
    expected = {"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 1, "num_tokens": 257}
    assert server.get("/get_load").json() == [expected]
    loads = server.get("/v1/loads?include=core,queues").json()
    (load,) = loads["loads"]
    assert load["num_running_reqs"] == 2 and load["num_used_tokens"] == 250
    assert load["token_usage"] == 0.25 and load["max_total_num_tokens"] == 1000


def test_metrics(server: Server) -> None:
    def read() -> dict[str, float]:
        families = text_string_to_metric_families(server.get("/metrics").text)
        return {
            sample.name: sample.value
            for family in families
            for sample in family.samples
            if sample.labels["model_name"] == MODEL and "le" not in sample.labels
        }

    eventually(lambda: bool(server.manager.scheduler_state))
    before = read()
    reply = server.generate(text="hello world")["meta_info"]
    with pytest.raises(requests.exceptions.ReadTimeout):
        body = {"text": "a", "sampling_params": script(hang=True)}
        requests.post(server.url + "/generate", json=body, timeout=0.2)
    eventually(lambda: server.manager.num_open == 0)
    after = read()
    change = {name: after[name] - before[name] for name in after}
    assert change["sglang:num_requests_total"] == 2
    assert change["sglang:num_aborted_requests_total"] == 1
    assert change["sglang:generation_tokens_total"] == reply["completion_tokens"]
    assert change["sglang:prompt_tokens_total"] == reply["prompt_tokens"] + 1
    assert change["sglang:time_to_first_token_seconds_count"] == 1
    assert change["sglang:e2e_request_latency_seconds_count"] == 2
    assert after["sglang:num_running_reqs"] == 2 and after["sglang:num_queue_reqs"] == 1
    assert after["tca:kv_cache_tree_slots"] == 30


def test_flush_cache(server: Server) -> None:
    assert requests.get(server.url + "/flush_cache", timeout=10).status_code == 200
    for body in (b"", b'{"empty_cache": true}', b"nonsense"):
        response = requests.post(server.url + "/flush_cache", data=body, timeout=10)
        assert response.status_code == 200
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body_json = {"text": "a", "rid": "busy", "sampling_params": script(hang=True)}
        reply = pool.submit(server.post, "/generate", body_json)
        eventually(lambda: server.scheduler.num_active == 1)
        response = server.post("/flush_cache", None)
        assert response.status_code == 400 and "running" in response.json()["message"]
        server.post("/abort_request", {"rid": "busy"})
        reply.result()


def test_profile(server: Server) -> None:
    assert server.get("/start_profile").status_code == 200
    assert server.get("/stop_profile").status_code == 200
    wish = {"output_dir": "traces", "num_steps": 3}
    assert server.post("/start_profile", wish).status_code == 200
    assert server.post("/stop_profile", None).status_code == 200
    assert [c.action for c in server.scheduler.controls[-2:]] == ["start_profile", "stop_profile"]
    assert server.scheduler.controls[-2].args == wish
    response = server.post("/start_profile", {"num_steps": 0})
    assert response.status_code == 400 and "num_steps" in response.text


def test_api_key() -> None:
    with running_server(api_key="sécret") as server:
        for path in ("/health", "/metrics", "/health_generate"):
            assert server.get(path).status_code == 200
        for wrong in ("", "Bearer wrong", "sécret".encode()):
            response = server.get("/server_info", headers={"Authorization": wrong})
            assert response.status_code == 401 and response.json()["code"] == 401
        assert server.post("/generate", {"text": "a"}).status_code == 401
        key = {"Authorization": "Bearer sécret".encode()}
        assert server.post("/generate", {"text": "a"}, headers=key).status_code == 200
        assert "sécret" not in server.get("/server_info", headers=key).text
