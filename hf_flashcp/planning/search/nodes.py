"""Strategy "search" with a `Topology`: little on the slower links between nodes.

Two kinds of plans are tried beside the flat one, which knows no nodes. The flat one's ranks, grouped so that those
which share documents share a node. And plans in two levels: the search shares documents out to nodes, each a rank with
the budgets of all of its ranks; then each node shares out what it holds. A document that is cut between nodes lies on
all ranks of each of them, zigzag, so that they share what crosses; whole documents are planned by the flat search.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...plan.hierarchical_traffic import hierarchical_traffic
from ...plan.slices import Lengths, Slice, Slices, attention_pairs, rank_pairs, rank_tokens
from ...plan.topology import Topology
from ...plan.traffic import by_link, traffic_matrix
from ..sharding import per_doc
from .construction import Budget
from .search import SETTINGS, Candidate, Search, search


BASES = ((0, 0.9), (2, 0.6))
"""Plans of nodes that are made first: by which of the search's settings, under which cap on attention pairs, 1 plus so
much of what the user allows above 1. The rest is room for the ranks of a node."""

TARGETS = ((0.6, 2.5), (0.7, 4.0), (0.5, 4.0))
"""Then ones like each of them whose busiest node should receive and send so many times as much, with so much spreading
of low positions. Both in the order of what each adds to those before it, on drawn packs."""

MANY = 1000
"""Documents beyond which only the first of each is made."""


def search_in_nodes(
    lengths: Lengths, cp_size: int, topology: Topology, *, max_imbalance: float, max_token_imbalance: float
) -> Slices:
    """Slices of every rank: of the plans tried, within the caps, the one whose busiest links take the shortest when
    rows cross to each node once, a row between nodes counted `inter_node_cost` times. Never busier than [`search`]'s,
    nor less balanced than that where it does not meet the caps. Pure and deterministic.

    Args:
        lengths (`tuple[int, ...]`): tokens of each document.
        cp_size (`int`): number of ranks, in full nodes.
        topology (`Topology`): of the ranks. With all of them in one node, or each in its own, the plan is `search`'s.
        max_imbalance, max_token_imbalance (`float`): see [`search`].
    """
    caps: dict[str, Any] = {"max_imbalance": max_imbalance, "max_token_imbalance": max_token_imbalance}
    flat = search(lengths, cp_size, **caps)
    found = [flat, *node_plans(flat, lengths, topology.ranks_per_node, **caps)]
    return min(found, key=lambda slices: busiest(slices, topology))


def busiest(slices: Slices, topology: Topology) -> tuple[float, float]:
    """What the busiest link of any rank carries in the first step of the exchange and in the second, in or out, and
    all links together: tokens whose KV travels, between nodes times `inter_node_cost`."""
    first, second = hierarchical_traffic(slices, min(topology.ranks_per_node, len(slices)))
    received, sent = by_link(first, topology.ranks_per_node)
    cost = np.array([[1.0], [topology.inter_node_cost]])
    handed_on = max(second.sum(0).max(), second.sum(1).max())
    return float((cost * np.maximum(received, sent)).max() + handed_on), float((cost * received).sum() + second.sum())


def node_plans(
    flat: Slices, lengths: Lengths, ranks_per_node: int, *, max_imbalance: float, max_token_imbalance: float
) -> Iterator[Slices]:
    """Plans that spare the links between nodes: a flat plan's ranks grouped, and one in two levels, if that is within
    the caps or no less balanced. None where ranks do not fill several nodes of several ranks."""
    cp_size = len(flat)
    nodes = cp_size // ranks_per_node
    if nodes * ranks_per_node != cp_size or 1 in (nodes, ranks_per_node):
        return
    yield grouped(flat, ranks_per_node)
    budget = Budget(lengths, cp_size, max_imbalance, max_token_imbalance)
    budget.most_pairs = max(budget.most_pairs, max(rank_pairs(flat)))
    found: list[Candidate] = []
    few = None if len(lengths) <= MANY else 1
    for setting, part in BASES[:few]:
        caps = 1 + part * (max_imbalance - 1), max_token_imbalance if budget.token_room else 1.0
        looking = Search(lengths, nodes, *caps)
        looking.budget.most_tokens = min(looking.budget.most_tokens, ranks_per_node * budget.most_tokens)
        base = looking.attempt(SETTINGS[setting])
        if base is not None and base.construction is not None:
            for share, spreading in TARGETS[:few]:
                looking.spread(base.construction, share * base.bottleneck, spreading)
        found += looking.found
    for plan in sorted(found, key=lambda plan: plan.bottleneck):
        slices = [held for node in plan.slices for held in _inside(node, ranks_per_node, budget)]
        if max(rank_pairs(slices)) <= budget.most_pairs and max(rank_tokens(slices)) <= budget.most_tokens:
            if all(slices):
                yield slices
                return


def grouped(slices: Slices, ranks_per_node: int) -> Slices:
    """The same slices on other ranks: rank after rank trades places with the one that spares most traffic between
    nodes, as long as any does."""
    traffic = traffic_matrix(slices)
    traffic = traffic + traffic.T
    ranks = np.arange(len(slices))
    node = ranks // ranks_per_node
    with_node = np.add.reduceat(traffic, ranks[::ranks_per_node], axis=1)
    settled = 0
    while settled < len(slices):
        for rank in ranks:
            here = node[rank]
            gain = with_node[rank, node] - with_node[rank, here] + with_node[:, here] - with_node[ranks, node]
            gain = np.where(node == here, 0, gain - 2 * traffic[rank])
            other = gain.argmax()
            settled += 1
            if gain[other] > 0:
                settled, there = 0, node[other]
                moved = traffic[:, other] - traffic[:, rank]
                with_node[:, here] += moved
                with_node[:, there] -= moved
                node[rank], node[other] = there, here
    return [slices[rank] for rank in np.argsort(node, kind="stable")]


def _inside(held: list[Slice], ranks: int, budget: Budget) -> Slices:
    """What a node holds, on its ranks: zigzag what is cut, and all of it where the rest cannot be planned."""
    whole: list[Slice] = []
    cut: list[Slice] = []
    for document, start, stop in held:
        (whole if stop - start == budget.lengths[document] else cut).append(Slice(document, start, stop))
    slices = _zigzag(cut, ranks)
    lengths = tuple(stop for _, _, stop in whole)
    if sum(lengths) < ranks:
        return _zigzag(held, ranks)
    tokens, mean_pairs = rank_tokens(slices), sum(attention_pairs(0, length) for length in lengths) / ranks
    pairs_cap = (budget.most_pairs - max(rank_pairs(slices))) / mean_pairs
    tokens_cap = (budget.most_tokens - max(tokens)) * ranks / sum(lengths) if budget.token_room else 1.0
    plan = Search(lengths, ranks, max(pairs_cap, 1.0), max(tokens_cap, 1.0)).attempt(SETTINGS[0])
    if plan is None:
        return _zigzag(held, ranks)
    # Ranks with a token less of what is cut get one more of the others.
    planned = sorted(plan.slices, key=lambda pieces: sum(start - stop for _, start, stop in pieces))
    for rank, pieces in zip(sorted(range(ranks), key=tokens.__getitem__), planned):
        slices[rank] += [Slice(whole[document].document, start, stop) for document, start, stop in pieces]
    return slices


def _zigzag(pieces: list[Slice], ranks: int) -> Slices:
    planned = per_doc(tuple(stop - start for _, start, stop in pieces), ranks)
    return [
        [
            Slice(pieces[index].document, pieces[index].start + start, pieces[index].start + stop)
            for index, start, stop in held
        ]
        for held in planned
    ]
