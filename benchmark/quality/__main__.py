"""``python -m benchmark.quality COMMAND``: see the commands' ``--help``."""

from __future__ import annotations

import argparse
import importlib
import sys

# Modules with ``add_arguments(parser)`` and ``run(args)``, loaded when their turn comes: where
# prompts are only run, nothing that generates them needs to be installed.
COMMANDS = {
    "generate": ("benchmark.quality.generate", "write the prompts of a data set to a file"),
    "http": ("benchmark.quality.http", "measure prompts through a server's OpenAI route"),
    "kvpress": ("benchmark.quality.kvpress_check", "the same methods in NVIDIA's kvpress"),
    "kvpress-answers": ("benchmark.quality.kvpress_answers", "prompts answered by kvpress"),
    "report": ("benchmark.quality.report", "write docs/quality.md from the records"),
    "errors": ("benchmark.quality.errors", "attention errors beside their bounds"),
    "run": ("benchmark.quality.plan", "measure the cells of a plan"),
}


def main(argv: list[str]) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    chosen, rest = parser.parse_known_args(argv)
    module = importlib.import_module(COMMANDS[chosen.command][0])
    own = argparse.ArgumentParser(
        prog=f"python -m benchmark.quality {chosen.command}",
        description=module.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    module.add_arguments(own)
    module.run(own.parse_args(rest))


if __name__ == "__main__":
    main(sys.argv[1:])
