"""Selection policies by name. To add one: a dataclass with ``rank``, and a line here."""

from __future__ import annotations

from tca_runtime.sparsity.policies.base import Candidates, SelectionPolicy
from tca_runtime.sparsity.policies.baselines import (
    ExpectedAttentionPolicy,
    FullPolicy,
    KeyDiffPolicy,
    SnapKVPolicy,
    StreamingPolicy,
)
from tca_runtime.sparsity.policies.options import read_options
from tca_runtime.sparsity.policies.pages import PagesPolicy
from tca_runtime.sparsity.policies.retrieval import H2OPolicy, QuestPolicy, TopKPolicy
from tca_runtime.sparsity.policies.tca import TCAPolicy

POLICIES: dict[str, type[SelectionPolicy]] = {
    "tca": TCAPolicy,
    "pages": PagesPolicy,
    "snapkv": SnapKVPolicy,
    "keydiff": KeyDiffPolicy,
    "expected-attention": ExpectedAttentionPolicy,
    "streaming": StreamingPolicy,
    "topk": TopKPolicy,
    "quest": QuestPolicy,
    "h2o": H2OPolicy,
    "full": FullPolicy,
}


def create_policy(text: str) -> SelectionPolicy:
    """A policy by its name, ``NAME`` or ``NAME:FIELD=VALUE,...``.

    Raises
    ------
    ValueError
        For an unknown name or field or a wrong value; says what there is.
    """
    name, separator, options = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"unknown selection policy {name!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name](**read_options(POLICIES[name], options) if separator else {})


__all__ = ["POLICIES", "Candidates", "SelectionPolicy", "create_policy"]
