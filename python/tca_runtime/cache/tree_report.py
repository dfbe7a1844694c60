"""The prefix tree for people and tools: what each node holds, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from tca_runtime.cache.head_slots import HeadSlots
from tca_runtime.cache.radix_tree import RadixNode, RadixTree


def describe_tree(tree: RadixTree, num_layers: int, limit: int) -> dict[str, Any]:
    """The ``limit`` most recently used nodes, parents before their children.

    Nodes are numbered in the order listed, so a ``parent`` is a place in the list, None at the
    top. Ratios are shares of the slots that a full cache of the node's tokens has.
    """
    namespace_of = {root: i for i, root in enumerate(tree.namespaces().values())}
    found = sorted(tree.nodes(), key=lambda node: (-node.last_access, node.slots.begin))
    number: dict[RadixNode, int] = {}
    nodes: list[dict[str, Any]] = []
    for node in found[:limit]:
        parent = node.parent
        assert parent is not None
        # A path is never older than what hangs on it, so a listed node's parent is listed too.
        above = number.get(parent)
        number[node] = len(nodes)
        namespace = namespace_of[parent] if above is None else nodes[above]["namespace"]
        nodes.append({"parent": above, "namespace": namespace, **_describe(node, num_layers)})
    return {
        "namespaces": [
            {"key": namespace.key, "prunable": namespace.prunable}
            for namespace in tree.namespaces()
        ],
        "num_nodes": len(found),
        "nodes": nodes,
    }


def _describe(node: RadixNode, num_layers: int) -> dict[str, Any]:
    device = _kept(node.slots, num_layers)
    report: dict[str, Any] = {
        "begin": node.slots.begin,
        "tokens": len(node.tokens),
        "state": node.state,
        "slots": node.slots.num_slots,
        "host_slots": 0,
        "hits": node.hits,
        "locks": node.locks,
        "repeated": node.repeated,
        "kept_ratio": float(np.mean(device)),
        "kept_ratio_by_layer": device,
    }
    if node.host is not None:
        report["host_slots"] = node.host.num_slots
        report["host_ratio_by_layer"] = _kept(node.host, num_layers)
    return report


def _kept(slots: HeadSlots, num_layers: int) -> list[float]:
    by_layer = slots.lengths.reshape(num_layers, -1).mean(axis=1) / slots.num_tokens
    ratios: list[float] = np.round(by_layer, 4).tolist()
    return ratios
