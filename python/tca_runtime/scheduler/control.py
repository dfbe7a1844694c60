"""Questions and commands about the whole scheduler, and the figures it reports."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tca_runtime.cache.tree_report import describe_tree
from tca_runtime.config import RuntimeConfig
from tca_runtime.messages import Control, ControlReply
from tca_runtime.scheduler.planner import StepPlan

if TYPE_CHECKING:
    from tca_runtime.engine.engine import Engine
    from tca_runtime.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Generation throughput is averaged over this many seconds.
RATE_WINDOW = 5.0
# Nodes that ``/tca/tree`` shows unless asked for more.
TREE_NODES = 1000


class ControlHandler:
    """Answers ``Control`` messages between steps, when no step is in flight."""

    def __init__(self, scheduler: Scheduler, engine: Engine, config: RuntimeConfig) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._max_running = config.scheduler.max_running_requests
        self._profile_dir = Path(config.server.profile_dir).resolve()
        self._profile_steps: int | None = None
        self._generated: deque[tuple[float, int]] = deque()
        self._profiler: torch.profiler.profile | None = None
        self._trace_path = Path()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.num_steps = 0
        self.step_seconds = 0.0

    def handle(self, message: Control) -> ControlReply:
        try:
            text, payload = getattr(self, f"_{message.action}")(message.args)
        except (ValueError, OSError) as error:
            return ControlReply(call_id=message.call_id, ok=False, message=str(error))
        return ControlReply(call_id=message.call_id, ok=True, message=text, payload=payload)

    def record_step(self, plan: StepPlan, seconds: float) -> None:
        """Count what a step did."""
        now = time.monotonic()
        ends = (c.end == c.request.num_tokens and c.request.max_new_tokens > 0 for c in plan.chunks)
        tokens = len(plan.decode) + sum(ends)
        for chunk in plan.chunks:
            self.prompt_tokens += chunk.size
            if chunk.request.sequence is not None and chunk.begin == chunk.request.cached_tokens:
                self.cached_tokens += chunk.begin
        self.generated_tokens += tokens
        self.num_steps += 1
        self.step_seconds += seconds
        if self._profile_steps is not None:
            self._profile_steps -= 1
            if self._profile_steps <= 0:
                try:
                    self._end_profile()
                except OSError as error:
                    logger.error("%s", error)
        self._generated.append((now, tokens))
        while self._generated and now - self._generated[0][0] > RATE_WINDOW:
            self._generated.popleft()

    def state(self) -> dict[str, Any]:
        """What ``/server_info``, ``/get_load`` and ``/metrics`` show."""
        planner, cache = self._scheduler.planner, self._engine.cache
        computed = self.prompt_tokens + self.cached_tokens
        return {
            "num_running_reqs": len(planner.running) + len(planner.prefilling),
            "max_running_requests": self._max_running,
            "num_waiting_reqs": len(planner.waiting),
            "num_grammar_reqs": sum(r.grammar is not None for r in planner.waiting),
            "num_retracted_reqs": sum(r.num_retractions > 0 for r in planner.waiting),
            "num_waiting_uncached_tokens": planner.waiting.uncached_tokens(cache),
            "num_retractions": planner.num_retractions,
            "num_raised": planner.num_raised,
            "reclaimed_slots": dataclasses.asdict(cache.reclaimer.counts),
            "max_total_num_tokens": cache.capacity_tokens,
            "available_tokens": cache.available_tokens,
            "prompt_tokens_total": computed,
            "cached_tokens_total": self.cached_tokens,
            "generation_tokens_total": self.generated_tokens,
            "num_steps": self.num_steps,
            "step_seconds_total": self.step_seconds,
            "cache_hit_rate": self.cached_tokens / computed if computed else 0.0,
            "gen_throughput": self._throughput(),
            "kv_cache": dataclasses.asdict(cache.usage()),
        }

    def _throughput(self) -> float:
        recent = [t for t in self._generated if time.monotonic() - t[0] <= RATE_WINDOW]
        return sum(tokens for _, tokens in recent) / RATE_WINDOW

    def _flush_cache(self, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if not self._scheduler.planner.is_idle:
            raise ValueError("requests are running or waiting; the cache was not flushed")
        self._engine.cache.flush()
        return "cache flushed", {}

    def _state(self, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "", self.state()

    def _tree(self, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        cache = self._engine.cache
        limit = args.get("limit", TREE_NODES)
        return "", describe_tree(cache.tree, cache.views.num_layers, limit)

    def _start_profile(self, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if self._profiler is not None:
            raise ValueError("a profile is being recorded already")
        directory = (self._profile_dir / (args.get("output_dir") or "")).resolve()
        if not directory.is_relative_to(self._profile_dir):
            raise ValueError(f"output_dir must be below {self._profile_dir} (--profile-dir)")
        directory.mkdir(parents=True, exist_ok=True)
        self._trace_path = directory / f"trace-{time.time():.3f}.json"
        self._profile_steps = args.get("num_steps")
        profiler = torch.profiler.profile()
        try:
            profiler.start()
        except RuntimeError as error:
            raise OSError(f"cannot record a profile: {error}") from error
        self._profiler = profiler
        return f"recording to {self._trace_path}", {}

    def _stop_profile(self, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if self._profiler is None:
            raise ValueError("no profile is being recorded")
        self._end_profile()
        return f"wrote {self._trace_path}", {"path": str(self._trace_path)}

    def _end_profile(self) -> None:
        """End the recording, whatever becomes of its trace.

        Raises
        ------
        OSError
            If the trace cannot be written.
        """
        profiler, self._profiler, self._profile_steps = self._profiler, None, None
        if profiler is None:
            return
        path = self._trace_path
        try:
            profiler.stop()
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            raise OSError(f"cannot write {path}: {error}") from error
        if not path.is_file():
            # The profiler says so in a line of its own, and nowhere else.
            raise OSError(f"cannot write {path}")
        logger.info("wrote %s", path)
