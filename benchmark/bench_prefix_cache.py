"""What the prefix cache saves, and that it changes no token.

Run from the root of the repository:

``python -m benchmark.bench_prefix_cache``: time to first token of the second turn of a chat,
against the same prompt cold (after /flush_cache), in turn, and how much of it was cached.

``python -m benchmark.bench_prefix_cache --equality``: greedy conversations of three turns against
a server without and then one with the prefix cache. The second run replays the prompts of the
first, so that one differing token cannot cause others; requests go one at a time, so that both
servers compute the same batches.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest

import aiohttp
from tqdm import tqdm

from benchmark.figures import Figure, all_passed, format_figures, load_before, save_figures
from benchmark.server_process import running_server
from benchmark.serving.client import (
    Endpoint,
    Message,
    flush_cache,
    generate,
    model_name,
    open_http,
    send,
    transcript,
)
from benchmark.serving.metrics import RequestResult
from benchmark.serving.sharegpt import DatasetError, user_turns
from benchmark.serving.workloads import (
    Session,
    multi_turn_sessions,
    random_text,
    synthetic_conversations,
)

TIMEOUT_S = 300


@dataclass(frozen=True)
class Round:
    """One chat: token counts of its turns, and the second turn's TTFT warm and cold."""

    first_prompt: int
    first_reply: int
    second_prompt: int
    cached: int
    cold_cached: int
    warm_s: float
    cold_s: float

    @property
    def recomputed(self) -> int:
        """Tokens of the first turn that the second one computed again."""
        return max(0, self.first_prompt + self.first_reply - self.cached)


@dataclass(frozen=True)
class Answer:
    """One turn of the equality check."""

    prompt: str
    output_ids: tuple[int, ...]
    cached_tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two checks; the exit status is 1 if a target is missed."""
    args = _parse(argv)
    load_before()
    try:
        return _equality(args) if args.equality else _second_turn(args)
    except DatasetError as error:
        sys.exit(f"error: {error}")


def _second_turn(args: argparse.Namespace) -> int:
    with running_server(_flags(args)) as server:
        rounds = asyncio.run(_measure_rounds(server.url, args))
    warm = statistics.median(r.warm_s for r in rounds)
    cold = statistics.median(r.cold_s for r in rounds)
    ratios = sorted(r.warm_s / r.cold_s for r in rounds)
    cached = statistics.median(r.cached / r.second_prompt for r in rounds)
    turn = statistics.median(r.second_prompt - r.first_prompt - r.first_reply for r in rounds)
    size = statistics.median(r.second_prompt for r in rounds)
    figures = [
        Figure("second turn, cold", cold * 1e3, "ms", detail=f"prompt of {size:.0f} tokens"),
        Figure("second turn, prefix cached", warm * 1e3, "ms", detail=f"{cached:.1%} cached"),
        Figure(
            "ratio of times to first token",
            warm / cold,
            "x",
            limit=0.15,
            detail=f"rounds {ratios[0]:.3f}..{ratios[-1]:.3f}",
        ),
        # The K and V of a reply's last token are computed only when something follows it.
        Figure(
            "tokens of turn one computed again, at most",
            max(r.recomputed for r in rounds),
            "tokens",
            limit=1,
            detail=f"the new turn has {turn:.0f}, template included",
        ),
        Figure("cached after a flush", max(r.cold_cached for r in rounds), "tokens", limit=0),
    ]
    return _report("prefix_cache", args, figures, {"rounds": [asdict(r) for r in rounds]})


async def _measure_rounds(url: str, args: argparse.Namespace) -> list[Round]:
    async with open_http(TIMEOUT_S) as http:
        model = await model_name(http, url)
        rounds = []
        for number in tqdm(range(args.rounds + 1), unit="chat"):
            rng = random.Random(args.seed * 1000 + number)
            measured = await _one_chat(http, url, model, rng, args.prompt_words)
            if number > 0:
                rounds.append(measured)
    return rounds


async def _one_chat(
    http: aiohttp.ClientSession, url: str, model: str, rng: random.Random, words: int
) -> Round:
    # A reply that runs past its end holds special tokens, which its text in turn two would lack.
    ends = Endpoint(url, "openai", model, ignore_eos=False)
    runs_on = Endpoint(url, "openai", model)
    await flush_cache(http, url)
    chat = [Message("user", f"Tell a story with these words: {random_text(rng, words)}")]
    first = _checked(await send(http, ends, chat, 64))
    question = f"What part do these play in it: {random_text(rng, 8)}?"
    chat += [Message("assistant", first.text), Message("user", question)]
    warm = _checked(await send(http, runs_on, chat, 8))
    await flush_cache(http, url)
    cold = _checked(await send(http, runs_on, chat, 8))
    if warm.ttft is None or cold.ttft is None:
        raise RuntimeError("a reply had no text, so it has no time to first token")
    return Round(
        first_prompt=first.prompt_tokens,
        first_reply=first.completion_tokens,
        second_prompt=warm.prompt_tokens,
        cached=warm.cached_tokens or 0,
        cold_cached=cold.cached_tokens or 0,
        warm_s=warm.ttft,
        cold_s=cold.ttft,
    )


def _equality(args: argparse.Namespace) -> int:
    sessions = _conversations(args)
    with running_server([*_flags(args), "--disable-radix-cache"]) as server:
        without = asyncio.run(_converse(server.url, sessions, args.max_tokens))
    with running_server(_flags(args)) as server:
        prompts = [answer.prompt for answer in without]
        cached = asyncio.run(_replay(server.url, prompts, args.max_tokens))
    differing = [differing_tokens(a, b) for a, b in zip(without, cached, strict=True)]
    total = sum(len(a.output_ids) for a in without)
    reused = sum(a.cached_tokens for a in cached)
    figures = [
        Figure("output tokens compared", total, "tokens", detail=f"{len(without)} turns"),
        Figure(
            "tokens that differ",
            sum(differing),
            "tokens",
            limit=0,
            detail=f"in {sum(d > 0 for d in differing)} turns",
        ),
        # Without these two the comparison would prove nothing.
        Figure("prompt tokens from the cache", reused, "tokens", "at least", 1),
        Figure(
            "the same without the cache", sum(a.cached_tokens for a in without), "tokens", limit=0
        ),
    ]
    turns = [
        {"without": a.output_ids, "with": b.output_ids, "cached_tokens": b.cached_tokens}
        for a, b in zip(without, cached, strict=True)
    ]
    return _report("prefix_cache_equality", args, figures, {"turns": turns})


def differing_tokens(left: Answer, right: Answer) -> int:
    """Count positions that differ; a missing token differs from any."""
    return sum(a != b for a, b in zip_longest(left.output_ids, right.output_ids))


async def _converse(url: str, sessions: Sequence[Session], max_tokens: int) -> list[Answer]:
    answers = []
    async with open_http(TIMEOUT_S) as http:
        for session in tqdm(sessions, unit="conversation", desc="without cache"):
            messages: list[Message] = []
            for turn in session.turns:
                messages.append(Message("user", turn.text))
                answer, text = await _ask(http, url, transcript(messages), max_tokens)
                answers.append(answer)
                messages.append(Message("assistant", text))
    return answers


async def _replay(url: str, prompts: Sequence[str], max_tokens: int) -> list[Answer]:
    async with open_http(TIMEOUT_S) as http:
        return [
            (await _ask(http, url, prompt, max_tokens))[0]
            for prompt in tqdm(prompts, unit="turn", desc="with cache")
        ]


async def _ask(
    http: aiohttp.ClientSession, url: str, prompt: str, max_tokens: int
) -> tuple[Answer, str]:
    sampling = {"max_new_tokens": max_tokens, "temperature": 0.0}
    result = _checked(await generate(http, url, prompt, sampling))
    return Answer(prompt, result.output_ids, result.cached_tokens or 0), result.text


def _checked(result: RequestResult) -> RequestResult:
    if result.error is not None:
        raise RuntimeError(f"request failed: {result.error}")
    return result


def _conversations(args: argparse.Namespace) -> list[Session]:
    if args.synthetic:
        source = synthetic_conversations(args.conversations, args.turns, args.seed)
    else:
        source = [turns for turns in user_turns() if len(turns) >= args.turns]
    return multi_turn_sessions(
        source, args.conversations, args.turns, args.max_chars, args.max_tokens, args.seed
    )


def _flags(args: argparse.Namespace) -> list[str]:
    return ["--model-path", args.model, "--disable-tca"]


def _report(
    name: str, args: argparse.Namespace, figures: Sequence[Figure], raw: dict[str, object]
) -> int:
    print(format_figures(figures))
    print(f"written to {save_figures(name, vars(args), figures, raw)}")
    return 0 if all_passed(figures) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.bench_prefix_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m", help="--model-path of the server")
    parser.add_argument("--seed", type=int, default=0)
    turn = parser.add_argument_group("second turn")
    turn.add_argument("--rounds", type=int, default=5, help="measured chats (5), after one more")
    turn.add_argument("--prompt-words", type=int, default=1900, help="of the first turn (1900)")
    equality = parser.add_argument_group("equality")
    equality.add_argument("--equality", action="store_true")
    equality.add_argument("--conversations", type=int, default=50)
    equality.add_argument("--turns", type=int, default=3)
    equality.add_argument("--max-tokens", type=int, default=48, help="of each reply (48)")
    equality.add_argument("--max-chars", type=int, default=1200, help="of each user turn (1200)")
    equality.add_argument("--synthetic", action="store_true", help="random words, no download")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
