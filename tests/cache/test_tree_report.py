"""What ``/tca/tree`` says is what the tree holds."""

from __future__ import annotations

import numpy as np
import torch

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.manager import CacheManager
from tca_runtime.cache.radix_tree import Namespace
from tca_runtime.cache.tree_report import describe_tree
from tests.cache.machines import LAYERS, make_manager

OTHER = Namespace("other", prunable=False)


def compute(manager: CacheManager, namespace: Namespace, tokens: list[int]) -> None:
    """What the scheduler does with a prompt that ends at once."""
    ids = np.array(tokens, dtype=np.int32)
    sequence = manager.begin(manager.match(namespace, ids), len(ids))
    assert sequence is not None
    manager.extend(sequence, len(ids) - sequence.computed)
    manager.release(namespace, sequence, ids)


def one_token_per_row_of_layer_one(slots: HeadSlots, importance: torch.Tensor) -> torch.Tensor:
    """A core that keeps all of layer 0 and, of each run, the first token of layer 1."""
    layer = np.repeat(np.arange(len(slots.lengths)), slots.lengths) // (
        len(slots.lengths) // LAYERS
    )
    return (torch.from_numpy(layer) == 0) | (slots.positions == slots.begin)


def test_nodes_namespaces_hits_and_ratios() -> None:
    manager = make_manager(tokens=60)
    shared = [1, 2, 3, 4]
    compute(manager, Namespace(), [*shared, 5, 6])
    compute(manager, Namespace(), [*shared, 7])
    compute(manager, OTHER, [9, 9])
    report = describe_tree(manager.tree, LAYERS, 100)
    assert report["namespaces"] == [
        {"key": "", "prunable": True},
        {"key": "other", "prunable": False},
    ]
    nodes = report["nodes"]
    assert report["num_nodes"] == len(nodes) == 4
    found = {(n["namespace"], n["begin"], n["tokens"], n["parent"], n["hits"]) for n in nodes}
    top = next(i for i, n in enumerate(nodes) if n["begin"] == 0 and n["namespace"] == 0)
    assert found == {(0, 0, 4, None, 1), (0, 4, 2, top, 0), (0, 4, 1, top, 0), (1, 0, 2, None, 0)}
    for node in nodes:
        assert node["state"] == "full" and node["locks"] == node["host_slots"] == 0
        assert node["kept_ratio"] == 1 and node["kept_ratio_by_layer"] == [1.0, 1.0]
        assert node["slots"] == node["tokens"] * manager.rows


def test_pruned_and_demoted_nodes_say_what_each_layer_keeps() -> None:
    for host_tokens, state in ((0, "pruned"), (40, "demoted")):
        manager = make_manager(
            tokens=24, host_tokens=host_tokens, choose_core=one_token_per_row_of_layer_one
        )
        compute(manager, Namespace(), list(range(10)))
        # Takes more than what is free: the first prefix shrinks to its core.
        compute(manager, OTHER, list(range(100, 116)))
        (node,) = [n for n in describe_tree(manager.tree, LAYERS, 9)["nodes"] if n["tokens"] == 10]
        assert node["state"] == state
        assert node["kept_ratio_by_layer"] == [1.0, 0.1]
        assert abs(node["kept_ratio"] - 0.55) < 1e-9
        dropped = manager.rows * 10 - node["slots"]
        assert node["host_slots"] == (dropped if host_tokens else 0)
        assert node.get("host_ratio_by_layer") == ([0.0, 0.9] if host_tokens else None)


def test_a_limit_keeps_the_latest_with_their_parents() -> None:
    manager = make_manager(tokens=60)
    for last in range(5):
        compute(manager, Namespace(), [1, 2, 3, 10 + last, 20 + last])
    compute(manager, Namespace(), [1, 2, 3, 10, 20, 30])
    report = describe_tree(manager.tree, LAYERS, 3)
    assert report["num_nodes"] == 7
    assert [(n["begin"], n["parent"]) for n in report["nodes"]] == [(0, None), (3, 0), (5, 1)]
