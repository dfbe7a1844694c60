"""Contexts shared by several questions: how they are served, and what is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from benchmark.quality.answers import KEPT_OUTPUT, OutOfTime, by_prefill, selection_report
from benchmark.quality.configurations import Configuration
from benchmark.quality.lab import Ask, Lab, Reply, release
from benchmark.quality.markup import Markup
from benchmark.quality.progress import bar
from benchmark.quality.records import Record, Records
from benchmark.quality.samples import Session, grade
from tca_runtime.models.loader import LoadedModel
from tca_runtime.scheduler.repetition import PROMPT, Repetition

# Sessions that are alive at the same time.
AT_ONCE = 25
# Sessions that compete for a device pool of this share of their contexts.
UNDER_PRESSURE, PRESSURE = 10, 0.55


@dataclass(frozen=True)
class Mode:
    """How a session's questions meet its context.

    Attributes
    ----------
    order : ``visible``: every question comes with the context, anew; ``turns``: the context is
        computed first, then one question after the other, each seeing the earlier ones;
        ``users``: context first, then all questions beside one another
    retention : as ``--tca-retention``
    pressure : the device holds a part of the sessions' contexts only
    host_gib : host tier
    core : what ranks slots that are dropped: ``budgeted`` or ``shared`` (``sparsity/core.py``)
    shrink : drop all but the core of every context before the first question
    rebuild : tokens of the context that the model repeats per pass before anything is dropped, so
        that dropping knows what that needs; 0 for none
    """

    order: str
    retention: str = "never"
    pressure: bool = False
    host_gib: float = 0.0
    core: str = "budgeted"
    shrink: bool = False
    rebuild: int = 0

    @property
    def at_once(self) -> int:
        return UNDER_PRESSURE if self.pressure else AT_ONCE


MODES = {
    "visible": Mode("visible"),
    "turns": Mode("turns"),
    "users": Mode("users"),
    "pressure-host": Mode("turns", "on-pressure", pressure=True, host_gib=16.0),
    "pressure-drop": Mode("turns", "on-pressure", pressure=True),
    "pruned": Mode("turns", "immediate"),
    "core": Mode("turns", "on-pressure", shrink=True),
    "core-shared": Mode("turns", "on-pressure", core="shared", shrink=True),
    "rebuilt": Mode("turns", "on-pressure", shrink=True, rebuild=256),
    "rebuilt-shared": Mode("turns", "on-pressure", core="shared", shrink=True, rebuild=256),
}


@dataclass(frozen=True)
class Prompts:
    """Token ids of a session: the context, and the context with what follows for every question."""

    session: Session
    context: list[int]
    turns: list[list[int]]
    alone: list[list[int]]

    @staticmethod
    def of(session: Session, markup: Markup, encode: Callable[[str], list[int]]) -> Prompts:
        """Pieces are tokenised on their own, so that a prefix of text is one of tokens."""
        context = encode(markup.head + session.context)
        history = list(context)
        turns, alone = [], []
        for turn in session.turns:
            asked = encode(turn.text + markup.answer)
            alone.append(context + asked)
            history = history + asked
            turns.append(history)
            history = history + encode(turn.gold + markup.question)
        return Prompts(session, context, turns, alone)


def run_conversations(
    loaded: LoadedModel,
    tokenizer: Any,
    sessions: Sequence[Session],
    modes: Sequence[str],
    configurations: Sequence[Configuration],
    records: Records,
    labels: dict[str, str],
    deadline: float = float("inf"),
    backend: str = "auto",
) -> None:
    """Measure what is missing in ``records``, one mode after the other.

    Raises
    ------
    OutOfTime
        When the deadline (``time.monotonic``) has passed.
    """
    markup = Markup.of(tokenizer)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    prompts = [Prompts.of(session, markup, encode) for session in sessions]
    length = max(session.length for session in sessions)
    configurations = by_prefill([c.at_length(length) for c in configurations])
    for name in modes:
        names = {**labels, "mode": name}
        missing = {
            c.name: [p for p in prompts if not _is_done(records, p.session, names, c)]
            for c in configurations
        }
        if not any(missing.values()):
            continue
        lab = _lab(loaded, MODES[name], prompts, backend)
        progress = bar(sum(map(len, missing.values())), f"{labels['data']} {name}")
        for configuration in configurations:
            left = missing[configuration.name]
            for begin in range(0, len(left), MODES[name].at_once):
                if time.monotonic() > deadline:
                    raise OutOfTime
                group = left[begin : begin + MODES[name].at_once]
                progress.set_description(f"{labels['data']} {name} {configuration.name}")
                lab.use(configuration)
                lab.flush()
                labelled = {**names, "config": configuration.name}
                records.add(_serve(lab, tokenizer, group, MODES[name], labelled))
                progress.update(len(group))
        progress.close()
        del lab
        release()


def _is_done(
    records: Records, session: Session, names: dict[str, str], configuration: Configuration
) -> bool:
    last = len(session.turns) - 1
    key = {**names, "config": configuration.name, "sample": session.id, "turn": last}
    return records.has(kind="turn", **key)


def _lab(loaded: LoadedModel, mode: Mode, prompts: Sequence[Prompts], backend: str) -> Lab:
    together = min(mode.at_once, len(prompts))
    if not mode.pressure:
        needed = together * max(len(p.turns[-1]) for p in prompts)
        extra = 6 * needed if mode.order == "visible" else needed // 2
        return Lab(
            loaded,
            tokens=needed + extra + 4096,
            retention=mode.retention,
            backend=backend,
            core=mode.core,
        )
    contexts = together * max(len(p.context) for p in prompts)
    longest = max(len(p.turns[-1]) for p in prompts)
    # One request at a time: whatever it does not need can be pushed out.
    return Lab(
        loaded,
        tokens=max(int(contexts * PRESSURE), int(longest * 1.25)),
        host_gib=mode.host_gib,
        retention=mode.retention,
        max_running=1,
        backend=backend,
        core=mode.core,
    )


def _serve(
    lab: Lab, tokenizer: Any, group: Sequence[Prompts], mode: Mode, labels: dict[str, str]
) -> list[Record]:
    found: list[Record] = []
    begin = time.perf_counter()
    before = replace(lab.engine.cache.reclaimer.counts)
    if mode.order != "visible":
        lab.generate([Ask(p.session.id, p.context, 0) for p in group])
        if mode.rebuild and lab.engine.sparsity is not None:
            length = lab.engine.model_config.max_position
            ids = tokenizer.encode(PROMPT, add_special_tokens=False)
            repetition = Repetition(lab.engine, ids, length, mode.rebuild)
            while repetition.advance():
                pass
        if mode.shrink and lab.engine.sparsity is not None:
            lab.engine.cache.reclaimer.shrink_all()
    usage = lab.engine.cache.usage()
    memory = usage.tree_slots / max(1, usage.full_equivalent_slots)
    rounds: list[list[tuple[Prompts, int]]]
    turns = max(len(p.session.turns) for p in group)
    if mode.order == "turns":
        rounds = [[(p, i) for p in group if i < len(p.turns)] for i in range(turns)]
    else:
        rounds = [[(p, i) for p in group for i in range(len(p.turns))]]
    for asked in rounds:
        asks = []
        for p, i in asked:
            ids = (p.turns if mode.order == "turns" else p.alone)[i]
            # A fresh request shares nothing, not even with the session's other questions.
            key = f"{p.session.id}/{i}" if mode.order == "visible" else None
            rid = f"{p.session.id}/{i}"
            asks.append(Ask(rid, ids, p.session.turns[i].max_new_tokens, extra_key=key))
        replies = lab.generate(asks)
        for (p, i), ask in zip(asked, asks, strict=True):
            found.append(_record(tokenizer, p, i, ask, replies[ask.rid], labels))
    after = lab.engine.cache.reclaimer.counts
    found.append(
        {
            "kind": "time",
            **labels,
            "samples": len(group),
            "seconds": round(time.perf_counter() - begin, 3),
            "memory": round(memory, 4),
            **{f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(after)},
        }
    )
    return found


def _record(
    tokenizer: Any, prompts: Prompts, turn: int, ask: Ask, reply: Reply, labels: dict[str, str]
) -> Record:
    session = prompts.session
    asked = session.turns[turn]
    text = tokenizer.decode(reply.ids, skip_special_tokens=True)
    return {
        "kind": "turn",
        **labels,
        "sample": session.id,
        "turn": turn,
        "task": session.task,
        "length": session.length,
        "score": round(grade(text, asked.answers, asked.metric), 4),
        "prompt": len(ask.ids),
        "cached": reply.cached_tokens,
        **selection_report(reply.tca),
        "sure": round(reply.sure, 3),
        "output": text[:KEPT_OUTPUT],
    }
