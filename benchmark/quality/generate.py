"""``generate``: write the prompts of a data set to one file, the same for the same seed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmark.quality import samples
from benchmark.quality.likelihood import passages
from benchmark.quality.markup import Markup
from benchmark.quality.progress import bar
from benchmark.quality.ruler import RULER
from benchmark.quality.ruler.base import Draft, fitted, largest_size
from benchmark.quality.samples import Sample
from benchmark.quality.sessions import BUILDERS, sessions
from benchmark.quality.short import gsm8k, mmlu
from tca_runtime.config import ModelArgs
from tca_runtime.tokenizer.loading import load_tokenizer

SHORT = {"gsm8k": gsm8k, "mmlu": mmlu}


def ruler_samples(
    tokenizer: Any, length: int, per_task: int, seed: int, tasks: list[str]
) -> Iterator[Sample]:
    """Samples of each task in turn, so that any beginning of the file has all tasks alike."""
    markup = Markup.of(tokenizer)
    count = token_counter(tokenizer)

    def count_tokens(draft: Draft) -> int:
        return count(markup.prompt(draft.user, draft.prefix))

    sizes = {}
    for name in tasks:
        limit = length - RULER[name].max_new_tokens
        sizes[name] = largest_size(RULER[name], f"{seed}/{name}/{length}", limit, count_tokens)
    for index in range(per_task):
        for name in tasks:
            task = RULER[name]
            limit = length - task.max_new_tokens
            identity = f"{name}/{length}/{seed}/{index}"
            draft = fitted(task, identity, limit, count_tokens, sizes[name])
            yield Sample(
                id=identity,
                task=name,
                length=length,
                text=markup.prompt(draft.user, draft.prefix),
                answers=draft.answers,
                max_new_tokens=task.max_new_tokens,
            )


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """Length of a text in tokens, special tokens in it counted as such."""
    backend = tokenizer.backend_tokenizer
    return lambda text: len(backend.encode_batch_fast([text])[0].ids)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", default="ruler", choices=("ruler", "sessions", "books", "gsm8k", "mmlu")
    )
    parser.add_argument("--model", required=True, help="whose tokenizer and chat template to use")
    parser.add_argument("--length", type=int, default=8192, help="prompt and output, in tokens")
    parser.add_argument("--per-task", type=int, default=16, help="of ruler and sessions; else all")
    parser.add_argument(
        "--tasks", nargs="*", default=list(RULER), choices=list(RULER), help="of kind ruler"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl.xz file")


def run(args: argparse.Namespace) -> None:
    """Write the file."""
    tokenizer = load_tokenizer(ModelArgs(model_path=args.model))
    made: list[Any] = []
    if args.kind == "ruler":
        total = args.per_task * len(args.tasks)
        source: Iterator[Any] = ruler_samples(
            tokenizer, args.length, args.per_task, args.seed, args.tasks
        )
    elif args.kind == "books":
        total = args.per_task
        source = passages(args.length, args.per_task, args.seed)
    elif args.kind in SHORT:
        total = args.per_task
        source = SHORT[args.kind](Markup.of(tokenizer), args.per_task, args.seed)
    else:
        total = args.per_task * len(BUILDERS)
        source = sessions(token_counter(tokenizer), args.length, args.per_task, args.seed)
    progress = bar(total, f"{args.kind} {args.length}")
    for item in source:
        made.append(item)
        progress.update()
    progress.close()
    samples.write(args.output, made)
