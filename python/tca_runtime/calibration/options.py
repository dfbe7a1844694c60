"""The command line of a calibration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tca_runtime.calibration.choose import OBJECTIVES, Goal, Objective
from tca_runtime.config import ModelArgs
from tca_runtime.sparsity.settings import DEFAULT_WINDOW

# In a source tree the data lies beside the packages.
DEFAULT_DATA = Path(__file__).resolve().parents[3] / "calib_data"
DEFAULT_LENGTH = 4096
# Changes answers least at equal memory (docs/calibration.md).
DEFAULT_OBJECTIVE: Objective = "output-error"


@dataclass(frozen=True)
class Options:
    """What to measure and what to make of it. ``goals`` share one pass over the samples."""

    model: ModelArgs
    data: Path
    output: Path
    goals: tuple[Goal, ...]
    samples: int
    length: int
    window: int
    seed: int
    resume: bool


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Options from command-line flags.

    Raises
    ------
    SystemExit
        On a flag or value that cannot be used, with a message.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tca_runtime.calibrate",
        description="Measure a model once and give each of its attention heads a budget.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model-path", required=True, help="a known model, Hugging Face directory or GGUF file")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of weights and KV cache",
    )
    add("--data", type=Path, default=DEFAULT_DATA, help="JSONL file, or a directory of them")
    add("--output", type=Path, required=True, help="JSON to write; several thresholds add -TAU")
    add("--threshold", type=float, nargs="+", default=[0.9], help="attention mass to retain")
    add("--objective", choices=OBJECTIVES, default=DEFAULT_OBJECTIVE, help="how budgets are chosen")
    add(
        "--ratio",
        nargs="+",
        help="keep ratio, or PREFILL,DECODE, for output-error: one, or one for each threshold; "
        "default: what mass takes",
    )
    add("--floor", default="0", help="least keep ratio of every head, or PREFILL,DECODE")
    add("--samples", type=int, default=15, help="prompts; the last fifth only judges the choice")
    add("--length", type=int, default=DEFAULT_LENGTH, help="tokens of a prompt")
    add("--window", type=int, default=DEFAULT_WINDOW, help="latest tokens that are never dropped")
    add("--seed", type=int, default=0, help="of the choice of prompts")
    add("--resume", action="store_true", help="reuse what an earlier run measured")
    args = parser.parse_args(argv)
    if args.samples < 2:
        parser.error("--samples must be at least 2: one to choose from, one to judge")
    if not 0 <= args.window < args.length:
        parser.error("--window must be at least 0 and less than --length")
    if not all(0 < threshold <= 1 for threshold in args.threshold):
        parser.error("--threshold must lie in (0, 1]")
    if args.ratio and args.objective != "output-error":
        parser.error("--ratio goes with --objective output-error")
    floors = _by_phase(parser, "--floor", args.floor)
    ratios: list[tuple[float, float] | None] = [None]
    if args.ratio:
        ratios = [_by_phase(parser, "--ratio", text, floors) for text in args.ratio]
    if len(ratios) == 1:
        ratios *= len(args.threshold)
    if len(ratios) != len(args.threshold):
        parser.error("--ratio: give one, or one for each threshold")
    objective: Objective = args.objective
    return Options(
        model=ModelArgs(model_path=args.model_path, device=args.device, dtype=args.dtype),
        data=args.data,
        output=args.output,
        goals=tuple(
            Goal(tau, objective, ratio, floors)
            for tau, ratio in zip(args.threshold, ratios, strict=True)
        ),
        samples=args.samples,
        length=args.length,
        window=args.window,
        seed=args.seed,
        resume=args.resume,
    )


def _by_phase(
    parser: argparse.ArgumentParser,
    flag: str,
    text: str,
    least: tuple[float, float] = (0.0, 0.0),
) -> tuple[float, float]:
    """``X`` or ``PREFILL,DECODE``."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) not in (1, 2) or not all(0 <= share <= 1 for share in shares):
        parser.error(f"{flag} {text}: one or two numbers in [0, 1] are expected")
    if shares[0] < least[0] or shares[-1] < least[1]:
        parser.error(f"{flag} {text} is below --floor")
    return shares[0], shares[-1]
