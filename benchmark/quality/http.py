"""``http``: prompts through ``/v1/completions`` of a running server.

The server's flags decide how it selects; ``--name`` says what they amount to, in the words of
``configurations.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp

from benchmark.quality import samples
from benchmark.quality.answers import KEPT_OUTPUT
from benchmark.quality.configurations import Configuration
from benchmark.quality.progress import bar
from benchmark.quality.records import Record, Records
from benchmark.quality.samples import Sample, grade


class ServerError(RuntimeError):
    """The server refused a request; the message is what it said."""


async def answer(http: aiohttp.ClientSession, url: str, sample: Sample) -> dict[str, Any]:
    """The server's reply to one prompt, decoded greedily."""
    body = {
        "model": "default",
        "prompt": sample.text,
        "temperature": 0,
        "max_tokens": sample.max_new_tokens,
    }
    async with http.post(f"{url}/v1/completions", json=body) as reply:
        if reply.status != 200:
            raise ServerError(f"{reply.status}: {await reply.text()}")
        found: dict[str, Any] = await reply.json()
        return found


async def measure(
    url: str, data: list[Sample], labels: dict[str, str], records: Records, concurrency: int
) -> None:
    """Ask for what ``records`` lacks and add each answer as it comes."""
    missing = [s for s in data if not records.has(kind="answer", sample=s.id, **labels)]
    progress = bar(len(missing), f"{labels['data']} {labels['config']}")
    room = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=None)

    async with aiohttp.ClientSession(timeout=timeout) as http:

        async def one(sample: Sample) -> None:
            async with room:
                begin = time.perf_counter()
                reply = await answer(http, url, sample)
                records.add([_record(sample, reply, labels, time.perf_counter() - begin)])
                progress.update()

        async with asyncio.TaskGroup() as tasks:
            for sample in missing:
                tasks.create_task(one(sample))
    progress.close()


def _record(
    sample: Sample, reply: dict[str, Any], labels: dict[str, str], seconds: float
) -> Record:
    text = reply["choices"][0]["text"]
    return {
        "kind": "answer",
        **labels,
        "sample": sample.id,
        "task": sample.task,
        "length": sample.length,
        "score": grade(text, sample.answers, sample.metric),
        "prompt": reply["usage"]["prompt_tokens"],
        "cached": 0,
        "seconds": round(seconds, 3),
        "output": text[-KEPT_OUTPUT:],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--name", required=True, help="configuration, e.g. full or 'tca p15 d39'")
    parser.add_argument("--model", required=True, help="label of the records")
    parser.add_argument("--data", type=Path, required=True, help="a file of prompts")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file; is continued")


def run(args: argparse.Namespace) -> None:
    """Ask for what the output file lacks."""
    labels = {
        "model": args.model,
        "data": args.data.name.removesuffix(".jsonl.xz"),
        "config": Configuration.parse(args.name).name,
    }
    data = samples.read(args.data, Sample)[: args.limit]
    asyncio.run(measure(args.url, data, labels, Records(args.output), args.concurrency))
