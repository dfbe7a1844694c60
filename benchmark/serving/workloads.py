"""What to send: conversations of one or more user turns, reproducible from a seed.

Lengths are in words; the words used are single tokens in common BPE vocabularies, so they are
close to token counts. The counts that are reported come from the server.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

COMMON_NOUNS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line"
)
WORDS = COMMON_NOUNS.split()


@dataclass(frozen=True)
class Turn:
    """One user message and the number of tokens wanted in reply."""

    text: str
    max_tokens: int


@dataclass(frozen=True)
class Session:
    """One conversation; a single request is a session of one turn."""

    turns: tuple[Turn, ...]
    system: str = ""


def random_text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def random_sessions(
    count: int, input_len: int, output_len: int, range_ratio: float, seed: int
) -> list[Session]:
    """Unrelated prompts; lengths are uniform in ``[range_ratio * length, length]``."""
    rng = random.Random(seed)
    return [
        Session(
            (
                Turn(
                    random_text(rng, _length(rng, input_len, range_ratio)),
                    _length(rng, output_len, range_ratio),
                ),
            )
        )
        for _ in range(count)
    ]


def shared_prefix_sessions(
    groups: int, questions: int, prefix_len: int, question_len: int, output_len: int, seed: int
) -> list[Session]:
    """``groups`` system prompts, each asked ``questions`` different questions, in mixed order."""
    rng = random.Random(seed)
    prefixes = [random_text(rng, prefix_len) for _ in range(groups)]
    sessions = [
        Session((Turn(random_text(rng, question_len), output_len),), system=prefix)
        for prefix in prefixes
        for _ in range(questions)
    ]
    rng.shuffle(sessions)
    return sessions


def multi_turn_sessions(
    conversations: Sequence[Sequence[str]],
    count: int,
    max_turns: int,
    max_chars: int,
    output_len: int,
    seed: int,
) -> list[Session]:
    """Draw ``count`` conversations of at least two turns, without replacement.

    Turns after ``max_turns`` are dropped and longer turns cut to ``max_chars``, which bounds the
    context that the model under test needs.

    Raises
    ------
    ValueError
        If there are fewer than ``count`` such conversations.
    """
    usable = [turns for c in conversations if len(turns := [t for t in c if t.strip()]) >= 2]
    if len(usable) < count:
        raise ValueError(f"{count} conversations wanted, {len(usable)} have two turns or more")
    return [
        Session(tuple(Turn(text[:max_chars], output_len) for text in turns[:max_turns]))
        for turns in random.Random(seed).sample(usable, count)
    ]


def synthetic_conversations(count: int, turns: int, seed: int) -> list[list[str]]:
    """Stand-in for ShareGPT without a network: long-tailed turns of random words."""
    rng = random.Random(seed)
    return [
        [random_text(rng, min(400, 4 + int(rng.lognormvariate(3.5, 1.0)))) for _ in range(turns)]
        for _ in range(count)
    ]


def _length(rng: random.Random, longest: int, range_ratio: float) -> int:
    return rng.randint(max(1, round(longest * range_ratio)), longest)
