"""What clients ask for, how they behave, and what a right reply looks like."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

# How a client behaves: reads the reply whole or as a stream, leaves before or during it, has it
# aborted from another connection, or reads it slowly.
Conduct = Literal["whole", "stream", "leave", "leave-stream", "abort", "slow"]
CONDUCTS: tuple[Conduct, ...] = ("whole", "stream", "leave", "leave-stream", "abort", "slow")
_WEIGHTS = (30, 30, 8, 12, 10, 10)

_SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Alan"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_REGEX = "[ab]{5,40}"
# Ids that the vocabulary of any model has.
_IDS = range(3, 250)


@dataclass(frozen=True)
class Job:
    """One request and its client.

    ``check`` gets each finished output, as ``/generate`` shapes it, and says what is wrong.
    ``refused`` is the status that the server must answer, None if it must serve the request.
    """

    kind: str
    conduct: Conduct
    rid: str
    path: str
    body: dict[str, Any]
    check: Callable[[dict[str, Any]], str | None]
    outputs: int = 1
    refused: int | None = None


class Traffic:
    """An endless supply of jobs, the same for the same seed.

    Parameters
    ----------
    capacity : tokens of the server's KV cache; prompts are sized by it
    """

    def __init__(self, seed: int, capacity: int, context: int) -> None:
        self._random = random.Random(seed)
        self._limit = min(capacity, context)
        self._documents = [self._ids(self._limit // 8) for _ in range(6)]
        self._serial = 0
        self._run = self._random.getrandbits(32)

    def job(self) -> Job:
        """The next request."""
        kinds = {
            self._short: 30,
            self._long: 12,
            self._shared: 22,
            self._unsure: 8,
            self._endless: 14,
            self._constrained: 10,
            self._several: 6,
            self._logprobs: 5,
            self._chat: 5,
            self._impossible: 2,
            self._nonsense: 2,
        }
        (make,) = self._random.choices(list(kinds), list(kinds.values()))
        (conduct,) = self._random.choices(CONDUCTS, _WEIGHTS)
        self._serial += 1
        return make(conduct, f"chaos-{self._run:08x}-{self._serial}")

    def _ids(self, count: int) -> list[int]:
        return self._random.choices(_IDS, k=max(count, 1))

    def _generate(
        self,
        kind: str,
        conduct: Conduct,
        rid: str,
        ids: list[int],
        tokens: int,
        **changes: Any,
    ) -> Job:
        params = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
        body = {"input_ids": ids, "rid": rid, "sampling_params": params}
        wanted = min(tokens, self._limit - len(ids))
        return Job(
            kind, conduct, rid, "/generate", body, lambda o: _exact(o, len(ids), wanted), **changes
        )

    def _short(self, conduct: Conduct, rid: str) -> Job:
        ids = self._ids(self._random.randint(1, 60))
        return self._generate("short", conduct, rid, ids, self._random.randint(1, 60))

    def _long(self, conduct: Conduct, rid: str) -> Job:
        ids = self._ids(self._random.randint(self._limit // 10, self._limit // 3))
        return self._generate("long", conduct, rid, ids, self._random.randint(1, 40))

    def _shared(self, conduct: Conduct, rid: str) -> Job:
        ids = self._random.choice(self._documents) + self._ids(self._random.randint(1, 40))
        return self._generate("shared prefix", conduct, rid, ids, self._random.randint(1, 60))

    def _unsure(self, conduct: Conduct, rid: str) -> Job:
        # Goes back to wait as soon as a token is drawn with less probability.
        job = self._shared(conduct, rid)
        confidence = self._random.choice([0.01, 0.1, 0.9])
        job.body["sampling_params"]["custom_params"] = {"min_confidence": confidence}
        return replace(job, kind="unsure")

    def _endless(self, conduct: Conduct, rid: str) -> Job:
        # Outgrows the memory that was free when it was admitted: somebody is retracted.
        tokens = self._random.randint(self._limit // 8, self._limit // 3)
        return self._generate("long output", conduct, rid, self._ids(30), tokens)

    def _several(self, conduct: Conduct, rid: str) -> Job:
        job = self._generate("n of one", conduct, rid, self._ids(40), 24, outputs=3)
        job.body["sampling_params"]["n"] = 3
        return job

    def _logprobs(self, conduct: Conduct, rid: str) -> Job:
        job = self._generate("logprobs", conduct, rid, self._ids(30), 12)
        job.body.update(return_logprob=True, logprob_start_len=0, top_logprobs_num=3)
        return job

    def _impossible(self, conduct: Conduct, rid: str) -> Job:
        ids = self._ids(self._limit + 1)
        return self._generate("never fits", conduct, rid, ids, 8, refused=400)

    def _nonsense(self, conduct: Conduct, rid: str) -> Job:
        job = self._generate("bad field", conduct, rid, self._ids(5), 8, refused=400)
        job.body["sampling_params"]["temperature"] = self._random.choice([-1, "hot", [1]])
        return job

    def _constrained(self, conduct: Conduct, rid: str) -> Job:
        name, value, check = self._random.choice(
            [
                ("regex", _REGEX, _matches_regex),
                ("json_schema", json.dumps(_SCHEMA), _matches_schema),
            ]
        )
        params = {"max_new_tokens": 120, "temperature": 1.0, name: value}
        body = {"input_ids": self._ids(10), "rid": rid, "sampling_params": params}
        return Job("constrained", conduct, rid, "/generate", body, check)

    def _chat(self, conduct: Conduct, rid: str) -> Job:
        words = " ".join(str(token) for token in self._ids(10))
        body = {
            "messages": [{"role": "user", "content": words}],
            "max_tokens": 20,
            "rid": rid,
        }
        if conduct not in ("whole", "stream"):
            conduct = "stream"
        return Job("chat", conduct, rid, "/v1/chat/completions", body, lambda output: None)


def _exact(output: dict[str, Any], prompt: int, tokens: int) -> str | None:
    meta = output["meta_info"]
    if meta["prompt_tokens"] != prompt or meta["completion_tokens"] != tokens:
        return f"{meta['prompt_tokens']}+{meta['completion_tokens']} tokens, not {prompt}+{tokens}"
    if len(output["output_ids"]) != tokens:
        return f"{len(output['output_ids'])} output ids, not {tokens}"
    return None


def _matches_regex(output: dict[str, Any]) -> str | None:
    return None if re.fullmatch(_REGEX, output["text"]) else f"{output['text']!r} is no {_REGEX}"


def _matches_schema(output: dict[str, Any]) -> str | None:
    if output["meta_info"]["finish_reason"]["type"] == "length":
        return None
    try:
        person = json.loads(output["text"])
    except ValueError as error:
        return f"no JSON: {error}"
    return None if set(person) == {"name", "age"} else f"{person} does not fit the schema"
