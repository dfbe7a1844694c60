"""What a client may ask of generation. Crosses process borders inside messages."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """A constraint on the output text.

    ``kind``: ``"json"`` means any JSON object (``value`` is ignored).
    """

    kind: Literal["regex", "json_schema", "ebnf", "json"]
    value: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling settings of one request, with SGLang's names and defaults.

    ``top_k`` is -1 when off. ``logit_bias`` maps token id to a bias added to the logit.
    ``seed`` makes the text a function of (prompt, settings, seed) alone; without one the
    scheduler draws one. ``n`` has been expanded into single requests before this crosses
    to the scheduler.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[int, float] = {}
    n: int = 1
    seed: int | None = None
    grammar: Grammar | None = None
    custom_params: dict[str, Any] = {}

    @property
    def is_greedy(self) -> bool:
        return self.temperature <= 1e-5 or self.top_k == 1
