"""``run``: the cells of a plan, most important first, within a time limit."""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.quality import lab, samples
from benchmark.quality.answers import OutOfTime, run_answers
from benchmark.quality.configurations import Configuration
from benchmark.quality.conversations import MODES, run_conversations
from benchmark.quality.lab import Lab
from benchmark.quality.likelihood import Passage, run_likelihood
from benchmark.quality.records import Record, Records
from benchmark.quality.samples import Item, Sample, Session
from tca_runtime.config import ModelArgs
from tca_runtime.models.loader import LoadedModel
from tca_runtime.tokenizer.loading import load_tokenizer

PLANS = Path(__file__).parent / "plans"


@dataclass(frozen=True)
class Stage:
    """Configurations over one data set.

    Attributes
    ----------
    data : name of the file, without ``.jsonl.xz``
    modes : of conversations; empty for single prompts
    limit : samples taken from the beginning of the file, None for all
    """

    data: str
    configurations: tuple[Configuration, ...]
    modes: tuple[str, ...] = ()
    limit: int | None = None

    @property
    def is_likelihood(self) -> bool:
        return self.data.startswith("books")


@dataclass(frozen=True)
class Part:
    """The share of a plan's samples that one of several processes measures."""

    index: int
    of: int

    @staticmethod
    def parse(text: str) -> Part:
        """Read ``I/N``.

        Raises
        ------
        ValueError
            Unless ``0 <= I < N``.
        """
        index, _, of = text.partition("/")
        part = Part(int(index), int(of))
        if not 0 <= part.index < part.of:
            raise ValueError(f"{text} is no part I/N with 0 <= I < N")
        return part

    def take(self, items: list[Item]) -> list[Item]:
        """What of the items is this part's."""
        return items[self.index :: self.of]


def read_plan(path: Path) -> list[Stage]:
    """Stages of a plan file, in order.

    The file is ``{"sets": {NAME: [configuration, ...]}, "stages": [{"data", "configurations",
    "modes"?, "limit"?}, ...]}``; a configuration ``@NAME`` stands for a set.

    Raises
    ------
    ValueError
        For an unknown configuration, set or mode.
    """
    plan = json.loads(path.read_text(encoding="utf-8"))
    stages = []
    for stage in plan["stages"]:
        names: list[str] = []
        for name in stage["configurations"]:
            if name.startswith("@") and name[1:] not in plan["sets"]:
                raise ValueError(f"{path}: there is no set {name}")
            names += plan["sets"][name[1:]] if name.startswith("@") else [name]
        modes = tuple(stage.get("modes", ()))
        if unknown := set(modes) - MODES.keys():
            raise ValueError(f"{path}: unknown modes {sorted(unknown)}; known: {', '.join(MODES)}")
        configurations = tuple(Configuration.parse(name) for name in dict.fromkeys(names))
        stages.append(Stage(stage["data"], configurations, modes, stage.get("limit")))
    return stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan", required=True, help="a file, or a name in benchmark/quality/plans"
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--data", type=Path, required=True, help="directory of generated files")
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file; is continued")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--tokens", type=int, help="KV pool of single prompts, in tokens")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument(
        "--part", type=Part.parse, default=Part(0, 1), help="I/N: every N-th sample from I on"
    )


def run(args: argparse.Namespace) -> None:
    """Run what the output file lacks."""
    deadline = time.monotonic() + args.minutes * 60
    path = Path(args.plan) if Path(args.plan).suffix else PLANS / f"{args.plan}.json"
    stages = read_plan(path)
    if args.list:
        for stage in stages:
            for configuration in stage.configurations:
                print(stage.data, *stage.modes, "|", configuration.name)
        return
    loaded = lab.load(args.model, args.device, args.dtype)
    records = Records(args.output)
    records.add([environment(args, loaded)])
    runner = PlanRunner(args, loaded, records, deadline)
    try:
        for stage in stages:
            runner.run(stage)
        print("the plan is complete")
    except OutOfTime:
        print(f"out of time; the same command continues {args.output}")


def environment(args: argparse.Namespace, loaded: LoadedModel) -> Record:
    """Where and with what the following records were measured."""
    cuda = loaded.device.type == "cuda"
    return {
        "kind": "run",
        "model": Path(args.model).name,
        "data": "",
        "device": torch.cuda.get_device_name(loaded.device) if cuda else platform.processor(),
        "torch": torch.__version__,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention_backend": args.attention_backend,
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


class PlanRunner:
    """Keeps the lab of single prompts between stages that need it."""

    def __init__(
        self, args: argparse.Namespace, loaded: LoadedModel, records: Records, deadline: float
    ) -> None:
        self._args = args
        self._loaded = loaded
        self._records = records
        self._deadline = deadline
        self._tokenizer: Any = load_tokenizer(ModelArgs(model_path=args.model))
        self._lab: Lab | None = None

    def run(self, stage: Stage) -> None:
        """Run one stage."""
        path, part = self._args.data / f"{stage.data}.jsonl.xz", self._args.part
        labels = {"model": Path(self._args.model).name, "data": stage.data}
        kind = Session if stage.modes else Passage if stage.is_likelihood else Sample
        items: list[Any] = part.take(samples.read(path, kind)[: stage.limit])
        if not items:
            # More processes than samples.
            return
        common = stage.configurations, self._records, labels, self._deadline
        if stage.modes:
            self._lab = None
            lab.release()
            run_conversations(
                self._loaded,
                self._tokenizer,
                items,
                stage.modes,
                *common,
                self._args.attention_backend,
            )
            return
        if self._lab is None:
            backend = self._args.attention_backend
            self._lab = Lab(self._loaded, tokens=self._args.tokens, backend=backend)
        measure = run_likelihood if stage.is_likelihood else run_answers
        measure(self._lab, self._tokenizer, items, *common)
