"""Mixed load for a while: shared prefixes, aborts, retractions, demotions; no slot is lost."""

from __future__ import annotations

import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from tca_runtime.messages import AbortRequest, TokenOutput
from tca_runtime.sampling_params import SamplingParams
from tests.gpu.tiny import Loop, loop, random_prompts, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Of all cases together.
SECONDS = float(os.environ.get("SOAK_SECONDS", "30"))


def submit(engine: Loop, number: int, stems: list[list[int]], dice: random.Random) -> None:
    stem = dice.choice(stems)
    prompt = stem[: dice.randint(1, len(stem))] + [dice.randrange(256) for _ in range(40)]
    sampling = SamplingParams(
        max_new_tokens=dice.choice([1, 8, 60, 300]),
        temperature=dice.choice([0.0, 1.0]),
        top_p=dice.choice([1.0, 0.9]),
        ignore_eos=True,
        custom_params=dice.choice([{}, {}, {}, {"tca": False}, {"min_confidence": 0.5}]),
    )
    engine.inbox.submit(str(number), prompt, sampling)


@dataclass
class Tally:
    """What happened during a soak."""

    requests: int = 0
    ended: int = 0
    failed: int = 0
    aborts: int = 0
    steps: int = 0
    cached_tokens: int = 0
    hits: int = 0
    output_tokens: int = 0
    checks: int = 0

    def count(self, output: TokenOutput) -> None:
        self.output_tokens += len(output.token_ids)
        if output.finish is None:
            return
        self.ended += 1
        self.failed += output.finish.status >= 500
        self.cached_tokens += output.cached_tokens
        self.hits += output.cached_tokens > 0


# What a tier's reclaiming must have done in a soak that is long enough.
CASES = {
    "host-tier": ("on-pressure", 0.02, ("demoted", "promoted")),
    "no-host-tier": ("on-pressure", 0.0, ("pruned", "evicted")),
    "immediate": ("immediate", 0.02, ("pruned",)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(SECONDS * 2 + 300)
def test_no_slot_is_lost(tmp_path: Path, case: str) -> None:
    retention, host_gib, must_happen = CASES[case]
    engine = loop(
        write_model(tmp_path / "m"),
        "cuda",
        "triton",
        tca="uniform:0.3",
        retention=retention,
        tokens=5000,
        host_cache_size=host_gib,
    )
    dice = random.Random(0)
    stems = random_prompts([2500, 1200, 1800, 300], seed=5)
    tally = Tally()
    end = time.monotonic() + SECONDS / len(CASES)
    while (
        time.monotonic() < end
        or tally.ended < tally.requests
        or not engine.scheduler.planner.is_idle
    ):
        running = time.monotonic() < end
        if running and tally.requests - tally.ended < 12 and dice.random() < 0.3:
            submit(engine, tally.requests, stems, dice)
            tally.requests += 1
        if running and tally.requests and dice.random() < 0.01:
            rid = str(dice.randrange(max(tally.requests - 12, 0), tally.requests))
            engine.inbox.messages.append(AbortRequest(rid=rid))
            tally.aborts += 1
        engine.scheduler.run_once()
        for output in engine.outbox.outputs:
            tally.count(output)
        engine.outbox.outputs.clear()
        tally.steps += 1
        if tally.steps % 50 == 0:
            engine.engine.cache.check()
            tally.checks += 1
    cache = engine.engine.cache
    cache.check()
    counts = asdict(cache.reclaimer.counts)
    retracted = engine.scheduler.planner.num_retractions
    table = {**asdict(tally), "retracted": retracted, **counts}
    print(f"\n{case}, {SECONDS / len(CASES):.0f} s")
    for name, value in table.items():
        print(f"  {name:14s} {value:>10}")
    assert tally.ended == tally.requests > 20
    assert tally.failed == 0 and tally.aborts > 0 and tally.hits > 0
    assert cache.usage().running_slots == 0
    assert all(counts[name] > 0 for name in must_happen)
    # Pruned at once, requests seldom fill the pool.
    assert retracted > 0 or SECONDS < 60 or retention == "immediate"
