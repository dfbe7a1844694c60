"""RULER's thirteen tasks (arXiv 2404.06654), with the paper's templates and parameters.

The last differs: HotpotQA's place is taken by ``qa_multidoc``, two questions about two SQuAD
passages among many, because HotpotQA is on no package registry.
"""

from __future__ import annotations

from benchmark.quality.ruler.base import RulerTask
from benchmark.quality.ruler.niah import Niah
from benchmark.quality.ruler.qa import MultiDocument, SingleDocument
from benchmark.quality.ruler.tracking import VariableTracking
from benchmark.quality.ruler.word_counts import CommonWords, FrequentWords

RULER: dict[str, RulerTask] = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value_kind="uuids"),
    "niah_multikey_1": Niah("essay", keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Niah("essay", values=4),
    "niah_multiquery": Niah("essay", keys=4, queries=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_squad": SingleDocument(),
    "qa_multidoc": MultiDocument(),
}

__all__ = ["RULER", "RulerTask"]
