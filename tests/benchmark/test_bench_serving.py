import json
from pathlib import Path

import pytest

from benchmark.bench_serving import main
from tests.benchmark.fake_server import FakeServer

LOADS = {
    "random": ["--num-sessions", "6", "--concurrency", "3"],
    "shared-prefix": ["--groups", "2", "--questions", "3", "--prefix-len", "20"],
    "multi-turn": ["--num-sessions", "3", "--max-turns", "2", "--synthetic", "--request-rate=500"],
}
# Two of three questions find 20 words of prefix; a second turn finds a first turn and its reply.
CACHED = {"random": (0, 6), "shared-prefix": (4 * 20, 4 * 24), "multi-turn": (3 * 8, 3 * 410)}


@pytest.mark.parametrize("workload", LOADS)
@pytest.mark.parametrize("backend", ["sglang", "openai"])
def test_run_writes_summary_and_plot(
    server: FakeServer, tmp_path: Path, backend: str, workload: str
) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    common = ["--base-url", server.url, "--backend", backend, "--input-len", "8"]
    files = ["--output", str(out), "--plot", str(plot), "--output-len", "4", "--flush-cache"]
    status = main([*common, *files, "--workload", workload, *LOADS[workload]])
    document = json.loads(out.read_text())
    summary = document["summary"]
    assert status == 0
    assert server.flushes == 1
    assert (summary["completed"], summary["errors"], summary["unsent"]) == (6, 0, 0)
    assert summary["completion_tokens"] == sum(r["completion_tokens"] for r in document["requests"])
    fewest, most = CACHED[workload]
    assert fewest <= summary["cached_tokens"] <= most
    assert document["settings"]["workload"] == workload
    assert "api_key" not in document["settings"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_errors_are_shown_and_set_the_exit_status(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.serving.workloads.WORDS", ["!http"])
    args = ["--base-url", server.url, "--num-sessions", "3", "--warmup", "0"]
    assert main(args) == 1
    assert "3 x ServerError: HTTP 400: prompt too long" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["sglang", "openai"])
def test_missing_server_is_named(backend: str) -> None:
    with pytest.raises(SystemExit, match=r"127\.0\.0\.1:9"):
        main(["--base-url", "http://127.0.0.1:9", "--backend", backend])
