"""Assigns ranks to nodes such that ranks that share documents share a node."""

from __future__ import annotations

import numpy as np


MOST_SWAPPED = 512
"""With more ranks than this, nodes are filled, but ranks do not change places afterwards."""

ROUNDS = 16
"""The most times that ranks change places."""


def group_ranks(traffic: np.ndarray, ranks_per_node: int) -> np.ndarray:
    """Return the ranks in an order in which each `ranks_per_node` of them share much traffic.

    Nodes are filled one after the other: the rank with the most traffic comes first, then the one that shares the most
    with those before it. Afterwards, ranks of different nodes change places as long as that saves traffic. If they
    share more in the order in which they come, that order is returned.

    Args:
        traffic (`np.ndarray`): tokens whose KV travels between each two ranks, (ranks, ranks) float64.
        ranks_per_node (`int`): number of ranks on each node.
    """
    shared = traffic + traffic.T
    order, as_given = _filled_nodes(shared, ranks_per_node), np.arange(len(shared))
    if len(order) <= MOST_SWAPPED:
        order = _swapped(shared, order, ranks_per_node)
    return max(order, as_given, key=lambda ranks: _inside_nodes(shared, ranks, ranks_per_node))


def _inside_nodes(shared: np.ndarray, order: np.ndarray, ranks_per_node: int) -> float:
    """Return the traffic between ranks of the same node."""
    nodes = order.reshape(-1, ranks_per_node)
    return float(shared[nodes[:, :, None], nodes[:, None]].sum())


def _filled_nodes(shared: np.ndarray, ranks_per_node: int) -> np.ndarray:
    total, taken, order = shared.sum(1), np.zeros(len(shared)), []
    for _ in range(len(shared) // ranks_per_node):
        with_node = total + 0.0
        for place in range(ranks_per_node):
            rank = int((with_node + taken).argmax())
            order.append(rank)
            taken[rank] = -np.inf
            with_node = with_node + shared[rank] if place else shared[rank]
    return np.array(order)


def _swapped(shared: np.ndarray, order: np.ndarray, ranks_per_node: int) -> np.ndarray:
    ranks, node = np.arange(len(order)), np.empty_like(order)
    node[order] = ranks // ranks_per_node
    for _ in range(ROUNDS):
        members = np.zeros((len(order), len(order) // ranks_per_node))
        members[ranks, node] = 1.0
        gained = shared @ members
        gained = (gained - gained[ranks, node][:, None])[:, node]
        gained += gained.T - 2 * shared
        gained[node[:, None] == node] = 0.0
        other = gained.argmax(1)
        most = gained[ranks, other]
        changed: set[int] = set()
        for rank in np.argsort(-most, kind="stable").tolist():
            nodes = {int(node[rank]), int(node[other[rank]])}
            if most[rank] > 0 and not nodes & changed:  # the gains of ranks in other nodes still hold
                changed |= nodes
                node[[rank, other[rank]]] = node[[other[rank], rank]]
        if not changed:
            break
    return np.argsort(node, kind="stable")
