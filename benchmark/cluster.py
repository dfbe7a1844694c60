"""Servers behind the unmodified ``sglang-router``, and what happens when one of them is killed.

Run from the root of the repository:

``python -m benchmark.cluster --serve``: start replicas and a router, and keep them until Ctrl-C.

``python -m benchmark.cluster``: hold multi-turn conversations through the router, first whole
replies, then streams, and kill a replica in the middle of each. A whole reply that was in flight on
the killed replica is retried by the router; a stream that had begun breaks, as nobody can take back
what its client has read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmark.figures import Figure, all_passed, format_figures, save_figures
from benchmark.server_process import RunningServer, free_port, running_server
from benchmark.serving.client import Endpoint, Message, open_http, send, transcript
from benchmark.serving.workloads import Session, multi_turn_sessions, synthetic_conversations

TINY = ("--load-format", "dummy", "--model-config", "tiny", "--max-total-tokens", "60000")
# The breaker of 0.3.x counts answers to clients' mistakes as failures of the server.
ROUTER_FLAGS = (
    *("--policy", "cache_aware", "--disable-circuit-breaker"),
    *("--health-check-interval-secs", "1", "--health-check-timeout-secs", "2"),
    *("--health-failure-threshold", "2", "--health-success-threshold", "1"),
    # Long enough that health checks find a dead server first: until then the policy sends a retry
    # to where its prefix was, which is the dead one.
    *("--retry-max-retries", "8", "--retry-initial-backoff-ms", "200"),
    *("--retry-backoff-multiplier", "2", "--retry-max-backoff-ms", "2000"),
    *("--worker-startup-check-interval", "1", "--log-level", "warn"),
)
START_S = 60.0


@dataclass(frozen=True)
class Cluster:
    """A router and the servers behind it."""

    url: str
    metrics_url: str
    replicas: list[RunningServer]

    def retries(self) -> int:
        """How often the router sent a request again."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
            text = response.read().decode()
        counts = re.findall(r"^smg_worker_retries_total\{[^}]*\} (\d+)", text, re.MULTILINE)
        return sum(int(count) for count in counts)

    def healthy(self) -> int:
        """Workers that the router sends requests to."""
        with urllib.request.urlopen(self.url + "/workers", timeout=10) as response:
            workers = json.load(response)["workers"]
        return sum(bool(worker["is_healthy"]) for worker in workers)


@dataclass
class Phase:
    """Turns of conversations while a replica is killed."""

    retries: int = 0
    in_flight: int = 0
    errors: list[str] = field(default_factory=list)
    turns: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    by_replica: list[int] = field(default_factory=list)
    seconds: float = 0.0


@contextmanager
def running_cluster(
    flags: Sequence[str], replicas: int = 2, port: int | None = None
) -> Iterator[Cluster]:
    """Run servers with ``flags`` and a router in front of them while the block lasts."""
    with ExitStack() as stack:
        servers = [stack.enter_context(running_server(flags)) for _ in range(replicas)]
        yield stack.enter_context(running_router(servers, port or free_port()))


@contextmanager
def running_router(servers: Sequence[RunningServer], port: int) -> Iterator[Cluster]:
    """Run a router in front of ``servers``.

    Raises
    ------
    RuntimeError
        If it does not find them in time; the message ends with its log.
    """
    metrics_port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", *ROUTER_FLAGS]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    command += ["--worker-urls", *(server.url for server in servers)]
    cluster = Cluster(
        f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics", list(servers)
    )
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "router.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            _wait_for_workers(process, cluster, log)
            yield cluster
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def kill(server: RunningServer) -> None:
    """Kill a replica with its scheduler, as a machine that goes down would."""
    family = [psutil.Process(server.pid)]
    family += family[0].children(recursive=True)
    for process in family:
        os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs(family[1:], timeout=10)


def conversations(count: int, seed: int, output_len: int = 48) -> list[Session]:
    """Short conversations of three turns."""
    source = synthetic_conversations(count, 3, seed)
    return multi_turn_sessions(source, count, 3, 400, output_len, seed)


async def converse_and_kill(
    cluster: Cluster,
    sessions: Sequence[Session],
    victim: RunningServer,
    stream: bool,
    concurrency: int = 8,
) -> Phase:
    """Hold conversations through the router; kill ``victim`` when half of the turns are done."""
    phase = Phase()
    before = cluster.retries()
    half = sum(len(session.turns) for session in sessions) // 2
    started = time.perf_counter()
    pending = iter(sessions)
    async with open_http(timeout_s=120) as http:

        async def client() -> None:
            for session in pending:
                await _converse(http, cluster.url, session, stream, phase)

        clients = [asyncio.create_task(client()) for _ in range(concurrency)]
        while phase.turns < half or not (in_flight := await _running(http, victim.url)):
            await asyncio.sleep(0.01)
        phase.in_flight = in_flight
        kill(victim)
        await asyncio.gather(*clients)
        phase.by_replica = [
            -1 if server is victim else await _served(http, server.url)
            for server in cluster.replicas
        ]
    phase.retries = cluster.retries() - before
    phase.seconds = time.perf_counter() - started
    return phase


async def _converse(
    http: aiohttp.ClientSession, url: str, session: Session, stream: bool, phase: Phase
) -> None:
    endpoint = Endpoint(url, "sglang")
    messages: list[Message] = []
    for turn in session.turns:
        messages.append(Message("user", turn.text))
        if stream:
            result = await send(http, endpoint, messages, turn.max_tokens)
            error, text = result.error, result.text
            cached, prompt = result.cached_tokens or 0, result.prompt_tokens
        else:
            error, text, cached, prompt = await _whole(http, url, messages, turn.max_tokens)
        phase.turns += 1
        if error is not None:
            # The client's own affair: it would ask again. This one gives the conversation up.
            phase.errors.append(error)
            return
        phase.cached_tokens += cached
        phase.prompt_tokens += prompt
        messages.append(Message("assistant", text))


async def _whole(
    http: aiohttp.ClientSession, url: str, messages: Sequence[Message], max_tokens: int
) -> tuple[str | None, str, int, int]:
    params = {"max_new_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    body = {"text": transcript(messages), "sampling_params": params}
    try:
        async with http.post(url + "/generate", json=body) as response:
            if response.status != 200:
                return f"HTTP {response.status}: {(await response.text())[:200]}", "", 0, 0
            reply: dict[str, Any] = await response.json()
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}", "", 0, 0
    meta = reply["meta_info"]
    return None, reply["text"], meta["cached_tokens"], meta["prompt_tokens"]


async def _running(http: aiohttp.ClientSession, url: str) -> int:
    async with http.get(url + "/server_info") as response:
        info = await response.json()
    return int(info["num_running_reqs"])


async def _served(http: aiohttp.ClientSession, url: str) -> int:
    async with http.get(url + "/metrics") as response:
        text = await response.text()
    (count,) = re.findall(r"^sglang:num_requests_total\{[^}]*\} ([\d.]+)", text, re.MULTILINE)
    return int(float(count))


def _wait_for_workers(process: subprocess.Popen[bytes], cluster: Cluster, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if cluster.healthy() == len(cluster.replicas):
                return
        except OSError:
            pass
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"the router did not find its workers in time:\n{tail}")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C, or measure; the exit status is 1 if a request was lost."""
    args = _parser().parse_args(argv)
    flags = TINY if args.model == "tiny" else ("--model-path", args.model)
    if args.serve:
        return _serve(flags, args.replicas, args.port)
    phases: dict[str, Phase] = {}
    for name, stream in (("whole", False), ("stream", True)):
        with running_cluster(flags) as cluster:
            sessions = conversations(args.conversations, seed=int(stream))
            phases[name] = asyncio.run(
                converse_and_kill(cluster, sessions, cluster.replicas[0], stream)
            )
    figures = _figures(phases)
    print(format_figures(figures))
    for name, phase in phases.items():
        for error, count in Counter(phase.errors).most_common(5):
            print(f"{name}: {count} x {error}")
    raw = {name: asdict(phase) for name, phase in phases.items()}
    print("wrote", save_figures("cluster", vars(args), figures, raw))
    return 0 if all_passed(figures) else 1


def _serve(flags: Sequence[str], replicas: int, port: int) -> int:
    with running_cluster(flags, replicas, port) as cluster:
        print(f"The router is ready: {cluster.url}, in front of")
        for server in cluster.replicas:
            print(f"  {server.url}")
        print("Ctrl-C ends them all.", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


def _figures(phases: dict[str, Phase]) -> list[Figure]:
    whole, stream = phases["whole"], phases["stream"]
    hits = whole.cached_tokens / max(whole.prompt_tokens, 1)
    return [
        Figure("turns, whole replies", whole.turns, ""),
        Figure("lost, whole replies", len(whole.errors), "", limit=0),
        Figure("in flight on the killed replica", whole.in_flight, ""),
        Figure("retried by the router", whole.retries, "", "at least", whole.in_flight),
        Figure("prompt tokens found in a cache", 100 * hits, "%"),
        Figure("turns, streams", stream.turns, ""),
        Figure("broken streams", len(stream.errors), "", limit=stream.in_flight),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.cluster",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--serve", action="store_true", help="start and keep running")
    parser.add_argument("--model", default="tiny", help="'tiny' for random weights, or a model")
    parser.add_argument("--replicas", type=int, default=2, help="--serve: servers")
    parser.add_argument("--port", type=int, default=30000, help="--serve: of the router")
    parser.add_argument("--conversations", type=int, default=40, help="of three turns each")
    return parser


if __name__ == "__main__":
    sys.exit(main())
