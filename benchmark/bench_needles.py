"""What TCA does to answers and to memory, against full attention in the same run.

    python -m benchmark.bench_needles --model qwen2.5-coder-0.5b --documents 10

Documents are stretches of books with invented facts hidden in them; a question asks for one, and
an answer is right when it names it. Scheduler and engine run in this process.

one-user : a document and a question in one prompt; both ways of attention answer it
two-users : a second user asks something else about a document that the first one left in the cache
pressure : between questions on a document another one is asked about, and the pool is too small
    for both (``--pool`` documents): with a host tier the first is demoted and comes back, without
    one it is pruned to what its first question kept; ``--questions`` are asked then
memory : ``--tca-retention immediate``, slots held against slots of a full cache

Shares have 95 % Wilson intervals. An interrupted run goes on where it was: what is finished is
kept in ``build/bench_needles``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.figures import Figure, all_passed, format_figures, load_before, save_figures
from benchmark.in_process import Answer, InProcessServer
from benchmark.intervals import wilson
from benchmark.long_prompts import BooksError, books, document
from tca_runtime.config import CacheArgs, ModelArgs, RuntimeConfig, SchedulerArgs, SparsityArgs
from tca_runtime.tokenizer.chat import ChatTemplate
from tca_runtime.tokenizer.loading import load_tokenizer

PARTIAL = Path("build/bench_needles")
NEW_TOKENS = 24
# Tokens beside a document: template, question, answer.
BESIDE = 256
FACTS = 8
EXPERIMENTS = ("one-user", "two-users", "pressure-host", "pressure", "memory")
FULL = "full attention"
# Answers per document, and how often the later questions count among them. "full-second" is full
# attention's side of the experiments under pressure.
ANSWERS = {
    "one-user": (2, 0),
    "two-users": (4, 0),
    "full-second": (0, 1),
    "pressure-host": (0, 1),
    "pressure": (0, 1),
    "memory": (1, 0),
}
MEMORY_DOCUMENTS = 4


@dataclass(frozen=True)
class Document:
    """A text and questions on it, as prompts, with what their answers must name."""

    prompts: tuple[list[int], ...]
    expected: tuple[str, ...]


class Bench:
    """Documents of one model, and servers over them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._model = ModelArgs(model_path=args.model, device=args.device, dtype=args.dtype)
        self._tokenizer = load_tokenizer(self._model)
        template = ChatTemplate(self._tokenizer)

        def count(text: str) -> int:
            return len(self._tokenizer.encode(text, add_special_tokens=False))

        def prompt(text: str, question: str) -> list[int]:
            content = f"Read this text.\n\n{text}\n\n{question} Answer in one short sentence."
            ids: list[int] = self._tokenizer.encode(
                template.render([{"role": "user", "content": content}])
            )
            return ids

        sources = books(args.books)
        self.documents = []
        for i in range(args.documents):
            rng = random.Random(f"{args.seed}-{i}")
            text, facts = document(rng, rng.choice(sources), args.tokens, count, FACTS)
            asked = rng.sample(facts, 1 + args.questions)
            self.documents.append(
                Document(tuple(prompt(text, f[1]) for f in asked), tuple(f[2] for f in asked))
            )

    def server(
        self, documents: float, retention: str = "on-pressure", host_gib: float = 0.0
    ) -> InProcessServer:
        """A server whose pool holds that many documents."""
        args = self.args
        return InProcessServer(
            RuntimeConfig(
                model=self._model,
                cache=CacheArgs(max_total_tokens=round(documents * (args.tokens + BESIDE))),
                scheduler=SchedulerArgs(
                    max_running_requests=4, chunked_prefill_size=args.chunked_prefill_size
                ),
                sparsity=SparsityArgs(
                    tca_config=args.tca_config,
                    tca_policy=args.tca_policy,
                    tca_retention=retention,
                    host_cache_size=host_gib,
                ),
            )
        )

    def row(self, answer: Answer, number: int, which: int, mode: str) -> dict[str, Any]:
        """What is kept of one answer."""
        text = self._tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        expected = self.documents[number].expected[which]
        return {
            "document": number,
            "question": which,
            "mode": mode,
            "right": expected.lower() in text.lower(),
            "answer": text,
            "expected": expected,
            "prompt_tokens": len(self.documents[number].prompts[which]),
            "cached_tokens": answer.cached_tokens,
            **(answer.tca or {}),
        }


def ask(server: InProcessServer, bench: Bench, number: int, which: int, tca: bool) -> Answer:
    prompt = bench.documents[number].prompts[which]
    ratio = bench.args.kept_ratio if tca else None
    return server.ask([prompt], NEW_TOKENS, tca=tca, kept_ratio=ratio)[0]


def one_user(bench: Bench, first: int) -> Iterator[dict[str, Any]]:
    """Every document's first question, with full attention and with TCA, nothing cached."""
    server = bench.server(1.5)
    for number in range(first, len(bench.documents)):
        for mode, tca in ((FULL, False), ("tca", True)):
            server.engine.cache.flush()
            yield bench.row(ask(server, bench, number, 0, tca), number, 0, mode)


def two_users(bench: Bench, first: int) -> Iterator[dict[str, Any]]:
    """Two questions on a cached document; full attention does the same."""
    server = bench.server(3.0)
    for number in range(first, len(bench.documents)):
        for mode, tca in ((FULL, False), ("tca", True)):
            server.engine.cache.flush()
            for which in (0, 1):
                yield bench.row(ask(server, bench, number, which, tca), number, which, mode)


def pressure(bench: Bench, first: int, host_gib: float) -> Iterator[dict[str, Any]]:
    """First question on a document, then the later ones on the one before."""
    server = bench.server(bench.args.pool, host_gib=host_gib)
    counts = server.engine.cache.reclaimer.counts
    count = len(bench.documents)
    for number in range(first, count + 1):
        if number < count:
            ask(server, bench, number, 0, True)
        for which in range(1, bench.args.questions + 1) if number > first else ():
            answer = ask(server, bench, number - 1, which, True)
            yield {**bench.row(answer, number - 1, which, "tca"), **asdict(counts)}


def full_second(bench: Bench, first: int) -> Iterator[dict[str, Any]]:
    """Full attention's answers to the later questions, for ``pressure``."""
    server = bench.server(1.5)
    for number in range(first, len(bench.documents)):
        server.engine.cache.flush()
        for which in range(1, bench.args.questions + 1):
            yield bench.row(ask(server, bench, number, which, False), number, which, FULL)


def memory(bench: Bench, first: int) -> Iterator[dict[str, Any]]:
    """Slots that cached prompts hold under immediate retention."""
    server = bench.server(3.0, retention="immediate")
    settings = server.engine.sparsity
    assert settings is not None
    ratio = bench.args.kept_ratio
    budgets = settings.decode if ratio is None else settings.decode.at_ratio(ratio)
    for number in range(first, min(MEMORY_DOCUMENTS, len(bench.documents))):
        server.engine.cache.flush()
        row = bench.row(ask(server, bench, number, 0, True), number, 0, "tca")
        usage = server.engine.cache.usage()
        yield {
            **row,
            "tree_slots": usage.tree_slots,
            "full_equivalent_slots": usage.full_equivalent_slots,
            "candidate_share": float(budgets.keep_ratio.mean()),
            # The window starts at a block's begin; the answer's own tokens stay too.
            "window_share": (settings.window + settings.block + NEW_TOKENS) / usage.cached_tokens,
        }


def rows_of(name: str, bench: Bench, first: int) -> Iterator[dict[str, Any]]:
    """The measurements of one experiment, from the ``first`` document on."""
    runs: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "one-user": lambda: one_user(bench, first),
        "two-users": lambda: two_users(bench, first),
        "full-second": lambda: full_second(bench, first),
        "pressure-host": lambda: pressure(bench, first, bench.args.host_gib),
        "pressure": lambda: pressure(bench, first, 0.0),
        "memory": lambda: memory(bench, first),
    }
    return runs[name]()


def measure(bench: Bench, name: str, deadline: float) -> list[dict[str, Any]]:
    """What an experiment has measured so far, going on until it is done or time is up."""
    path = PARTIAL / f"{_key(bench.args, name)}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    fixed, per_question = ANSWERS[name]
    each = fixed + per_question * bench.args.questions
    documents = len(bench.documents)
    documents = min(MEMORY_DOCUMENTS, documents) if name == "memory" else documents
    done = len(rows) // each
    del rows[done * each :]
    if done < documents and time.monotonic() < deadline:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with path.open("a") as file:
            for row in rows_of(name, bench, done):
                rows.append(row)
                print(json.dumps(row), file=file, flush=True)
                if len(rows) % each == 0 and time.monotonic() > deadline:
                    break
    print(f"{name}: {len(rows) // each} of {documents} documents", flush=True)
    return rows[: len(rows) // each * each]


def accuracy(label: str, rows: Sequence[dict[str, Any]]) -> Figure:
    right = sum(row["right"] for row in rows)
    low, high = wilson(right, len(rows))
    detail = f"[{low:.1%}, {high:.1%}], {right} of {len(rows)}"
    return Figure(label, 100 * right / max(1, len(rows)), "% right", detail=detail)


def compare(
    name: str, full: Sequence[dict[str, Any]], tca: Sequence[dict[str, Any]]
) -> Iterator[Figure]:
    """Shares of right answers, what only one side got right, and what was kept."""
    yield accuracy(f"{name}: {FULL}", full)
    yield accuracy(f"{name}: tca", tca)
    by_place = {(row["document"], row["question"]): row for row in full}
    places = [(row, (row["document"], row["question"])) for row in tca]
    pairs = [(by_place[place], row) for row, place in places if place in by_place]
    lost = sum(a["right"] and not b["right"] for a, b in pairs)
    won = sum(b["right"] and not a["right"] for a, b in pairs)
    same = sum(a["answer"] == b["answer"] for a, b in pairs)
    detail = f"only tca right {won}, same text {same} of {len(pairs)}"
    yield Figure(f"{name}: only {FULL} right", lost, "answers", detail=detail)
    kept = [row["kept_ratio"] for row in tca if "kept_ratio" in row]
    if kept:
        dropped = float(np.mean([row["dropped_mass"] for row in tca if "kept_ratio" in row]))
        detail = f"window included; dropped mass {dropped:.4f}"
        yield Figure(f"{name}: kept", 100 * float(np.mean(kept)), "% of slots", detail=detail)


def figures_of(measured: dict[str, list[dict[str, Any]]]) -> Iterator[Figure]:
    """Everything that was measured, experiment by experiment."""
    for name in ("one-user", "two-users"):
        rows = measured.get(name, [])
        if rows:
            sides = [[r for r in rows if (r["mode"] == FULL) == side] for side in (True, False)]
            yield from compare(name, *sides)
    for name in ("pressure-host", "pressure"):
        rows = measured.get(name, [])
        if rows:
            yield from compare(name, measured["full-second"], rows)
            hits = float(np.mean([r["cached_tokens"] / r["prompt_tokens"] for r in rows]))
            last = rows[-1]
            detail = ", ".join(
                f"{what} {last[what]}" for what in ("demoted", "promoted", "pruned", "evicted")
            )
            yield Figure(f"{name}: prompt found in the cache", 100 * hits, "%", detail=detail)
    rows = measured.get("memory", [])
    if rows:
        ratios = [r["tree_slots"] / r["full_equivalent_slots"] for r in rows]
        limit = max(r["candidate_share"] + 0.02 + r["window_share"] for r in rows)
        yield Figure("memory: slots held / full cache", max(ratios), "", limit=limit)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing; the exit status is 1 if a target is missed."""
    args = _parse(argv)
    load = load_before()
    try:
        bench = Bench(args)
    except BooksError as error:
        sys.exit(f"error: {error}")
    PARTIAL.mkdir(parents=True, exist_ok=True)
    names = [*args.experiments]
    if any(name.startswith("pressure") for name in names):
        names.insert(0, "full-second")
    deadline = time.monotonic() + args.max_seconds
    measured = {name: measure(bench, name, deadline) for name in names}
    found = list(figures_of(measured))
    if not found:
        print("nothing to compare yet; run it again")
        return 0
    print(format_figures(found))
    settings = {**vars(args), "load_before": load}
    print(save_figures(f"needles_{args.name}", settings, found, measured))
    return 0 if all_passed(found) else 1


def _key(args: argparse.Namespace, name: str) -> str:
    what = {k: v for k, v in vars(args).items() if k not in ("max_seconds", "experiments", "books")}
    return f"{args.name}-{name}-{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_options(parser)
    add = parser.add_argument
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    add("--max-seconds", type=float, default=1e9, help="stop after the document that exceeds this")
    add("--name", default="qwen0.5b", help="of the results file")
    return parser.parse_args(argv)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What ``Bench`` and ``ask`` read."""
    add = parser.add_argument
    add("--model", default="qwen2.5-coder-0.5b", help="a known model, directory or GGUF file")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--tca-config", help="as the server's; the shipped configuration by default")
    add("--tca-policy", default="tca")
    add("--kept-ratio", type=float, help="of what a head can drop; as configured by default")
    add("--books", type=Path, help="folder of the books; fetched with npm otherwise")
    add("--documents", type=int, default=10)
    add("--tokens", type=int, default=3840, help="of a document")
    add("--questions", type=int, default=1, choices=range(1, FACTS), help="asked under pressure")
    add("--seed", type=int, default=0)
    add("--pool", type=float, default=2.1, help="documents that the pool holds under pressure")
    add("--host-gib", type=float, default=2.0, help="host tier of pressure-host")
    add("--chunked-prefill-size", type=int, default=2048)


if __name__ == "__main__":
    sys.exit(main())
