"""Traffic from rude clients against a server whose memory is too small, with or without kills.

Run from the root of the repository: ``python -m benchmark.chaos --minutes 10``. Requests of every
kind (short, long, shared prefix, constrained, several outputs, impossible ones) come from clients
that read, leave, stall and abort. With ``--kill-every`` the scheduler is killed or stopped again
and again under ``--restart-on-crash``. At the end every request must have been answered exactly
once, with an error only while the scheduler was dead, and no slot may be missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from benchmark.chaos.clients import Outcome, Record, run_job
from benchmark.chaos.traffic import Traffic
from benchmark.figures import RESULTS, Figure, all_passed, format_figures, save_figures
from benchmark.server_process import RunningServer, running_server

TINY = ("--load-format", "dummy", "--model-config", "tiny")
# A memory that the traffic overfills, and selection from short prompts on.
PRESSURE = (
    *("--max-total-tokens", "3000", "--host-cache-size", "0.001", "--max-running-requests", "24"),
    *("--tca-config", "uniform:0.3", "--tca-window", "64", "--tca-min-candidates", "64"),
    *("--tca-refresh", "64", "--chunked-prefill-size", "512"),
)
WATCHDOG_S = 5
RESTARTING = (
    *("--restart-on-crash", "--max-restarts", "100000"),
    *("--watchdog-timeout", str(WATCHDOG_S)),
)
# The server of ``benchmark.chaos.server`` has by then looked for the owner of every slot.
IDLE_CHECK_S = 4.0


@dataclass
class Kill:
    """A fault: when it was done, and when /health answered 200 again."""

    how: str
    at: float
    recovered: float = 0.0


@dataclass
class Run:
    """What one run saw."""

    records: list[Record] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    flushed: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def violations(self) -> list[Record]:
        """Requests that were treated wrongly."""
        return [r for r in self.records if not self._is_right(r)]

    def _is_right(self, record: Record) -> bool:
        if record.outcome is Outcome.FAILED:
            return any(k.at <= record.ended and record.started <= k.recovered for k in self.kills)
        return record.outcome not in (Outcome.WRONG, Outcome.LOST)

    def lost_slots(self) -> int:
        """Slots that are missing or doubled: by the counters, and after everything was dropped."""
        lost = 0
        for cache in (self.info["kv_cache"], self.flushed["kv_cache"]):
            lost += abs(
                cache["total_slots"]
                - cache["free_slots"]
                - cache["tree_slots"]
                - cache["running_slots"]
            )
            lost += abs(
                cache["host_total_slots"] - cache["host_free_slots"] - cache["host_tree_slots"]
            )
        cache = self.flushed["kv_cache"]
        lost += cache["total_slots"] - cache["free_slots"]
        return lost + cache["host_total_slots"] - cache["host_free_slots"]

    def summary(self) -> dict[str, Any]:
        """For the results file."""
        pressure = {**self.info["reclaimed_slots"], "retracted": self.info["num_retractions"]}
        return {
            "seconds": round(self.seconds, 1),
            "requests": len(self.records),
            "outcomes": dict(Counter(r.outcome.value for r in self.records)),
            "kinds": dict(Counter(r.kind for r in self.records)),
            "conducts": dict(Counter(r.conduct for r in self.records)),
            "violations": [f"{r.kind}, {r.conduct}: {r.detail}" for r in self.violations()],
            "faults": dict(Counter(k.how for k in self.kills)),
            "recovery_seconds": [round(k.recovered - k.at, 2) for k in self.kills],
            "reclaimed": pressure,
            "unexplained_crashes": self.info["num_restarts"] - len(self.kills),
            "lost_slots": self.lost_slots(),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run, judge, report; the exit status is 1 if anything was lost."""
    args = _parser().parse_args(argv)
    name = "chaos-kills" if args.kill_every else "chaos"
    name += "" if args.model == "tiny" else f"-{args.model}"
    model = TINY if args.model == "tiny" else ("--model-path", args.model)
    flags = [*model, *PRESSURE, *(RESTARTING if args.kill_every else ())]
    with running_server(flags, module="benchmark.chaos.server") as server:
        run = asyncio.run(_run(server, args))
    earlier = _earlier(name) if args.add else []
    runs = [*earlier, run.summary()]
    figures = _figures(runs, under_pressure=args.model == "tiny")
    print(format_figures(figures))
    for violation in runs[-1]["violations"][:20]:
        print("VIOLATION:", violation)
    print(json.dumps({k: v for k, v in runs[-1].items() if k != "violations"}, indent=1))
    if not args.no_save:
        settings = {"flags": flags, "clients": args.clients, "kill_every": args.kill_every}
        print("wrote", save_figures(name, settings, figures, {"runs": runs}))
    return 0 if all_passed(figures) else 1


async def _run(server: RunningServer, args: argparse.Namespace) -> Run:
    run = Run()
    started = time.monotonic()
    stop_at = started + 60 * args.minutes
    # A connection for each request: one that is kept may be closed by the server as it is used
    # again, which no client could tell from a lost request. And little buffering: a slow reader
    # must make the server wait.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        connector=connector, read_bufsize=1 << 12, timeout=aiohttp.ClientTimeout(total=None)
    ) as http:
        info = await _info(http, server.url)
        limits = info["max_total_num_tokens"], info["context_length"]
        print(f"the server is ready: {server.url}", flush=True)
        clients = [
            asyncio.create_task(
                _client(http, server.url, Traffic(seed, *limits), random.Random(seed), run, stop_at)
            )
            for seed in range(1000 * args.seed, 1000 * args.seed + args.clients)
        ]
        if args.kill_every:
            await _kill(http, server, run, stop_at, args)
        await asyncio.gather(*clients)
        print(f"{len(run.records)} requests are through", flush=True)
        await asyncio.sleep(IDLE_CHECK_S)
        run.info = await _info(http, server.url)
        async with http.post(server.url + "/flush_cache") as response:
            response.raise_for_status()
        run.flushed = await _info(http, server.url)
    run.seconds = time.monotonic() - started
    return run


async def _client(
    http: aiohttp.ClientSession,
    url: str,
    traffic: Traffic,
    rng: random.Random,
    run: Run,
    stop_at: float,
) -> None:
    while time.monotonic() < stop_at:
        record = await run_job(http, url, traffic.job(), rng)
        run.records.append(record)
        if record.outcome is Outcome.FAILED:
            await asyncio.sleep(0.5)


async def _kill(
    http: aiohttp.ClientSession,
    server: RunningServer,
    run: Run,
    stop_at: float,
    args: argparse.Namespace,
) -> None:
    """Kill the scheduler, or stop it so that the watchdog must, each time it has recovered."""
    rng = random.Random(args.seed)
    while True:
        await asyncio.sleep(rng.uniform(0.5, 1.5) * args.kill_every)
        if time.monotonic() > stop_at:
            return
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
        kill = Kill(number.name, time.monotonic(), recovered=float("inf"))
        run.kills.append(kill)
        _scheduler(server).send_signal(number)
        while await _status(http, server.url) == 200:
            await asyncio.sleep(0.02)
        while await _status(http, server.url) != 200:
            await asyncio.sleep(0.05)
        kill.recovered = time.monotonic()


def _scheduler(server: RunningServer) -> psutil.Process:
    children = psutil.Process(server.pid).children()
    return max(children, key=lambda child: child.memory_info().rss)


async def _status(http: aiohttp.ClientSession, url: str) -> int:
    async with http.get(url + "/health") as response:
        return response.status


async def _info(http: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with http.get(url + "/server_info") as response:
        response.raise_for_status()
        info: dict[str, Any] = await response.json()
    return info


def _earlier(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return []
    runs: list[dict[str, Any]] = json.loads(path.read_text())["raw"]["runs"]
    return runs


def _figures(runs: Sequence[dict[str, Any]], under_pressure: bool) -> list[Figure]:
    seconds = sum(run["seconds"] for run in runs)
    requests = sum(run["requests"] for run in runs)
    violations = sum(len(run["violations"]) for run in runs)
    recoveries = sorted(s for run in runs for s in run["recovery_seconds"])
    figures = [
        Figure("soak length", seconds, "s"),
        Figure("requests", requests, ""),
        Figure("not answered exactly once", violations, "", limit=0),
        Figure("slots lost", sum(run["lost_slots"] for run in runs), "", limit=0),
        Figure("crashes", sum(run["unexplained_crashes"] for run in runs), "", limit=0),
    ]
    if recoveries:
        figures += [
            Figure("scheduler faults survived", len(recoveries), ""),
            Figure("time to recover, median", recoveries[len(recoveries) // 2], "s"),
            Figure("time to recover, worst", recoveries[-1], "s"),
        ]
        return figures
    for what in ("demoted", "promoted", "pruned", "evicted", "retracted"):
        total = sum(run["reclaimed"][what] for run in runs)
        unit = "requests" if what == "retracted" else "slots"
        # Only a fast model makes enough of a crowd for all of them in any run.
        figures.append(Figure(what, total, unit, "at least", 1 if under_pressure else None))
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.chaos",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of traffic")
    parser.add_argument("--model", default="tiny", help="'tiny' for random weights, or a model")
    parser.add_argument("--clients", type=int, default=32, help="at a time")
    parser.add_argument("--seed", type=int, default=0, help="of requests, conducts and faults")
    parser.add_argument("--kill-every", type=float, help="seconds between faults of the scheduler")
    parser.add_argument("--add", action="store_true", help="add to the runs in the results file")
    parser.add_argument("--no-save", action="store_true", help="write no results file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
