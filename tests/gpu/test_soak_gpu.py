"""Mixed load for a while: shared prefixes, aborts, retractions, demotions; no slot is lost."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tca_runtime.messages import AbortRequest, GenerateRequest
from tca_runtime.sampling_params import SamplingParams
from tests.gpu.tiny import Loop, loop, random_prompts, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SECONDS = float(os.environ.get("SOAK_SECONDS", "20"))


def submit(engine: Loop, number: int, stems: list[list[int]], dice: random.Random) -> None:
    stem = dice.choice(stems)
    prompt = stem[: dice.randint(1, len(stem))] + [dice.randrange(256) for _ in range(40)]
    sampling = SamplingParams(
        max_new_tokens=dice.choice([1, 8, 60, 300]),
        temperature=dice.choice([0.0, 1.0]),
        top_p=dice.choice([1.0, 0.9]),
        ignore_eos=True,
        custom_params={"tca": False} if dice.random() < 0.2 else {},
    )
    packed = np.asarray(prompt, dtype="<i4").tobytes()
    message = GenerateRequest(rid=str(number), input_ids=packed, sampling=sampling)
    engine.inbox.messages.append(message)


@pytest.mark.parametrize("retention", ["on-pressure", "immediate"])
@pytest.mark.timeout(1200)
def test_no_slot_is_lost(tmp_path: Path, retention: str) -> None:
    model = write_model(tmp_path / "m")
    engine = loop(
        model,
        "cuda",
        "triton",
        tca="uniform:0.3",
        retention=retention,
        tokens=5000,
        host_cache_size=0.02,
    )
    dice = random.Random(0)
    stems = random_prompts([2500, 1200, 1800, 300], seed=5)
    number = ended = aborted = steps = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or ended < number or not engine.scheduler.planner.is_idle:
        running = time.monotonic() < end
        if running and number - ended < 12 and dice.random() < 0.3:
            submit(engine, number, stems, dice)
            number += 1
        if running and number and dice.random() < 0.01:
            engine.inbox.messages.append(AbortRequest(rid=str(dice.randrange(number))))
            aborted += 1
        engine.scheduler.run_once()
        ended += sum(o.finish is not None for o in engine.outbox.outputs)
        engine.outbox.outputs.clear()
        steps += 1
        if steps % 50 == 0:
            engine.engine.cache.check()
    engine.engine.cache.check()
    usage = engine.engine.cache.usage()
    assert ended == number > 20 and aborted > 0
    assert usage.running_slots == 0
    counts = engine.engine.cache.reclaimer.counts
    print(f"{number} requests, {steps} steps, {engine.scheduler.planner.num_retractions} retracted")
    print(counts)
    assert counts.demoted + counts.pruned + counts.evicted > 0
