"""``kvpress-answers``: prompts answered by NVIDIA's kvpress, to stand beside our policies.

Runs in an environment of its own, because kvpress needs an older transformers than we do::

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5 gguf msgspec
    PYTHONPATH=. kvpress/bin/python -m benchmark.quality kvpress-answers --model DIRECTORY \
        --data ruler-4096.jsonl.xz --output theirs.jsonl

then, here, ``kvpress-answers --compare theirs.jsonl ours.jsonl`` with the records of a ``run`` over
the same prompts. A press drops what a policy of the same name drops at the end of a dense prefill,
``p100`` in a configuration's name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmark.quality import samples
from benchmark.quality.records import Record, Records, read
from benchmark.quality.samples import Sample, grade
from benchmark.quality.statistics import bootstrap

WINDOW = 64
KEPT = 0.39
FULL = "full"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="directory with a GGUF file")
    parser.add_argument("--data", type=Path, help="a generated file of single prompts")
    parser.add_argument("--limit", type=int, help="prompts, evenly over the tasks")
    parser.add_argument("--output", type=Path, help="a .jsonl file; is continued")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("THEIRS", "OURS"))


def run(args: argparse.Namespace) -> None:
    """Answer, or compare."""
    if args.compare:
        compare(*args.compare)
    else:
        answer(args.model, args.data, args.limit, args.output)


def answer(model_path: Path, data: Path, limit: int | None, output: Path) -> None:
    """Answer every prompt with full attention and with both presses, kept tokens as ``KEPT``."""
    import torch
    from kvpress import KeyDiffPress, SnapKVPress  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = model_path.glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(model_path), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    presses: dict[str, Any] = {
        FULL: None,
        "snapkv": SnapKVPress(compression_ratio=1 - KEPT, window_size=WINDOW, kernel_size=5),
        "keydiff": KeyDiffPress(compression_ratio=1 - KEPT),
    }
    records = Records(output)
    for sample in spread(samples.read(data, Sample), limit):
        ids = tokenizer(sample.text, return_tensors="pt", add_special_tokens=False).input_ids
        for name, press in presses.items():
            if records.has(kind="answer", config=name, sample=sample.id):
                continue
            begin = time.perf_counter()
            with torch.inference_mode(), press(model) if press else contextlib.nullcontext():
                made = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=sample.max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                )
            text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            score = grade(text, sample.answers, sample.metric)
            found = {"kind": "answer", "config": name, "sample": sample.id, "task": sample.task}
            found |= {"prompt": ids.shape[1], "score": round(score, 4), "output": text[:160]}
            records.add([found])
            seconds = time.perf_counter() - begin
            print(f"{sample.id} {name}: {score:.2f} in {seconds:.1f} s", flush=True)


def spread(items: list[Sample], limit: int | None) -> list[Sample]:
    """The first ``limit`` when tasks take turns."""
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for item in items:
        by_task[item.task].append(item)
    longest = max(map(len, by_task.values()))
    turns = [g[i] for i in range(longest) for g in by_task.values() if i < len(g)]
    return turns[:limit]


def compare(theirs: Path, ours: Path) -> None:
    """Print both sides' accuracy over the prompts that all of them answered."""
    sides: dict[str, dict[str, Record]] = defaultdict(dict)
    for side, path in (("kvpress", theirs), ("runtime", ours)):
        for record in read(path):
            if record["kind"] == "answer":
                policy = record["config"].split()[0]
                sides[f"{side} {policy}"][record["sample"]] = record
    shared = set.intersection(*(set(found) for found in sides.values()))
    rows = {}
    for name, found in sorted(sides.items()):
        members = [found[sample] for sample in sorted(shared)]
        scores, tasks = [r["score"] for r in members], [r["task"] for r in members]
        rows[name] = str(bootstrap(scores, tasks))
        print(f"{name:20s} {rows[name]} over {len(shared)} prompts")
    for policy in sorted({name.split()[1] for name in sides}):
        pair = [sides[f"{side} {policy}"] for side in ("kvpress", "runtime")]
        same = sum(pair[0][s]["score"] == pair[1][s]["score"] for s in shared)
        lost = [pair[1][s]["score"] - pair[0][s]["score"] for s in sorted(shared)]
        tasks = [pair[0][s]["task"] for s in sorted(shared)]
        print(f"{policy}: {same} of {len(shared)} score alike; ours minus theirs", end=" ")
        print(bootstrap(lost, tasks))
        rows[f"{policy}: ours minus theirs"] = str(bootstrap(lost, tasks))
    print(json.dumps(rows))
