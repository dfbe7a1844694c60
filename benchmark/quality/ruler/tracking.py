"""Variable tracking: which names were assigned a value, over a chain of assignments."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from benchmark.quality.ruler.base import Draft, RulerTask
from benchmark.quality.ruler.niah import NOISE

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {query}, they are: "
)
# Lines of noise in the worked example that comes before the question.
EXAMPLE_SIZE = 12


@dataclass(frozen=True)
class VariableTracking(RulerTask):
    """One chain of ``hops`` assignments between lines of noise, after one worked example."""

    hops: int = 4
    max_new_tokens: int = 30
    step: int = 4

    def build(self, rng: random.Random, size: int, short: bool) -> Draft:
        example = self._draft(rng, EXAMPLE_SIZE, 3)
        solved = example.user + example.prefix + " ".join(g[0] for g in example.answers)
        asked = self._draft(rng, size, 5)
        return Draft(f"{solved}\n\n{asked.user}", asked.prefix, asked.answers)

    def _draft(self, rng: random.Random, size: int, letters: int) -> Draft:
        count = self.hops + 1
        names: list[str] = []
        while len(names) < count:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        value = str(rng.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:], strict=False)]
        lines = [NOISE] * max(size, count)
        places = sorted(rng.sample(range(len(lines)), count))
        for shift, (place, assignment) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + shift, assignment)
        return Draft(
            TEMPLATE.format(context="\n".join(lines), query=value),
            PREFIX.format(count=count, query=value),
            [[name] for name in names],
        )
