"""Strategy "search" with a `Topology`: plans with little traffic on the slower links between nodes.

Besides the flat plan, which ignores nodes, two kinds of plans are tried. The first is the flat plan with its ranks
regrouped, so that ranks that share documents share a node. The second is made in two levels. The search first assigns
documents to nodes, as if each node were one rank with the caps of all its ranks. Each node then divides its documents
among its ranks. A document that is cut between nodes is split in a zigzag over all ranks of each of these nodes, so
that they share the traffic between nodes. Documents that are whole on a node are planned by the flat search.
"""

from __future__ import annotations

import numpy as np

from ...plan.link_traffic import CutSlices, LinkTraffic, Nodes, full_links, rank_traffic
from ...plan.slice_table import SliceColumns, SliceTable
from ...plan.slices import Slice, Slices, attention_pairs, rank_pairs, rank_tokens
from ...plan.topology import Topology
from ..caps import Caps
from ..sharding import per_doc
from .candidates import Candidate, Candidates
from .grouping import group_ranks
from .search import search
from .settings import SETTINGS


BASES = ((SETTINGS[0], 0.9), (SETTINGS[2], 0.6))
"""Settings of the base plans of nodes, each with the fraction of the user's slack (what the cap on attention pairs
allows above 1) that nodes may use. The rest is left to the ranks inside a node. The order is that of how much each
improves on those before it, on sampled packs."""

TARGETS = ((0.6, 2.5), (0.7, 4.0), (0.5, 4.0))
"""Pairs of target and spreading for further plans like a base, in the same kind of order. The target is a fraction of
what the base's busiest node receives or sends; [`Construction`] explains both."""

MANY = 1000
"""Number of documents above which only the first base and the first target are tried."""


def search_in_nodes(caps: Caps, topology: Topology, state_tokens: float = 0.0) -> Slices:
    """Return the slices of every rank in the plan whose busiest links need the least time.

    Rows are sent to each node once, and a row between nodes counts `inter_node_cost` times. The links are never busier
    than those of the plan of [`search`]. If that plan does not meet the caps, the result is not less balanced. If all
    ranks share one node, or each has its own, the result is the plan of `search`. Pure and deterministic.
    """
    flat = search(caps, state_tokens=state_tokens)
    found = [flat, *node_plans(flat, caps, topology.ranks_per_node)]
    return min(found, key=lambda slices: busiest(slices, topology, state_tokens))


def busiest(slices: Slices, topology: Topology, state_tokens: float = 0.0) -> tuple[float, float]:
    """Return the load of the busiest links and of all links together, in the hierarchical exchange.

    The load is in tokens whose KV travels, and tokens between nodes count `inter_node_cost` times. A state counts as
    `state_tokens` tokens. The first number is the load of the busiest link of any rank in the first step, in or out,
    plus that in the second step.
    """
    cut, nodes = cut_slices(slices), Nodes(len(slices), len(slices), topology.ranks_per_node)
    links = full_links(cut, nodes, hierarchical=True)
    if state_tokens:
        states = full_links(cut.contracted(), nodes, hierarchical=True)
        links = LinkTraffic(*(kv + state_tokens * moved for kv, moved in zip(links, states)))
    cost = np.array([[1.0], [topology.inter_node_cost]])
    busiest_link = (cost * np.maximum(links.received, links.sent)).max() + links.forwarded.max()
    return float(busiest_link), float((cost * links.received).sum() + links.forwarded[0].sum())


def cut_slices(slices: Slices) -> CutSlices:
    """Return the slices of the documents that are cut."""
    return CutSlices.of(SliceTable.of_columns(SliceColumns.of(slices).maximal()))


def node_plans(flat: Slices, caps: Caps, ranks_per_node: int) -> list[Slices]:
    """Return plans with little traffic between nodes: a flat plan with its ranks regrouped, and one in two levels.

    The latter is left out if it is neither within the caps nor as balanced as the flat plan. The list is empty if the
    ranks do not fill several nodes of several ranks.
    """
    nodes, left_over = divmod(caps.cp_size, ranks_per_node)
    several = not left_over and 1 not in (nodes, ranks_per_node)
    caps = caps.with_most(pairs=max(caps.most_pairs, max(rank_pairs(flat))))
    found = [grouped(flat, ranks_per_node)] if several else []
    built = _shared_out_to_nodes(caps, nodes) if several else []
    for plan in sorted(built, key=lambda plan: plan.bottleneck):
        slices = [held for node in plan.slices for held in _inside(node, ranks_per_node, caps)]
        if all(slices) and caps.allow(slices):
            found.append(slices)
            break
    return found


def _shared_out_to_nodes(caps: Caps, nodes: int) -> list[Candidate]:
    """Return plans that assign documents to nodes, as if each node were one rank."""
    found: list[Candidate] = []
    few = None if len(caps.lengths) <= MANY else 1
    for settings, part in BASES[:few]:
        imbalance = 1 + part * (caps.max_imbalance - 1), caps.max_token_imbalance if caps.token_room else 1.0
        of_nodes = Caps(caps.lengths, nodes, *imbalance)
        most_tokens = min(of_nodes.most_tokens, caps.cp_size // nodes * caps.most_tokens)
        candidates = Candidates(of_nodes.with_most(tokens=most_tokens))
        base = candidates.build(settings)
        if base is not None:
            for share, spreading in TARGETS[:few]:
                candidates.build_like(base, share * base.bottleneck, spreading)
        found += candidates.found
    return found


def grouped(slices: Slices, ranks_per_node: int) -> Slices:
    """Reorder ranks for less traffic between nodes, see [`group_ranks`]."""
    traffic = rank_traffic(cut_slices(slices), len(slices), 1)[0]
    return [slices[rank] for rank in group_ranks(traffic, ranks_per_node)]


def _inside(held: list[Slice], ranks: int, caps: Caps) -> Slices:
    """Divide the slices of a node among its ranks.

    Documents that are cut between nodes are split in a zigzag. So are all others if they cannot be planned.
    """
    whole = [piece for piece in held if piece.tokens == caps.lengths[piece.document]]
    slices = _zigzag([piece for piece in held if piece.tokens < caps.lengths[piece.document]], ranks)
    planned = _whole_inside(whole, slices, caps)
    if planned is None:
        slices = _zigzag(held, ranks)
    else:
        # Ranks with a token less of the cut documents get a token more of the whole ones.
        tokens = rank_tokens(slices)
        planned.sort(key=lambda pieces: -sum(stop - start for _, start, stop in pieces))
        for rank, pieces in zip(sorted(range(ranks), key=tokens.__getitem__), planned):
            slices[rank] += [Slice(whole[index].document, start, stop) for index, start, stop in pieces]
    return slices


def _whole_inside(whole: list[Slice], beside: Slices, caps: Caps) -> Slices | None:
    """Return a plan of a node's whole documents, numbered as in `whole`, or `None` if there is none.

    The node's ranks already hold the slices `beside`.
    """
    ranks, lengths = len(beside), tuple(piece.tokens for piece in whole)
    if sum(lengths) < ranks:
        return None
    mean_pairs = sum(attention_pairs(0, length) for length in lengths) / ranks
    pairs = (caps.most_pairs - max(rank_pairs(beside))) / mean_pairs
    tokens = (caps.most_tokens - max(rank_tokens(beside))) * ranks / sum(lengths) if caps.token_room else 1.0
    built = Candidates(Caps(lengths, ranks, max(pairs, 1.0), max(tokens, 1.0))).build(SETTINGS[0])
    return None if built is None else list(built.slices)


def _zigzag(pieces: list[Slice], ranks: int) -> Slices:
    planned = per_doc(tuple(piece.tokens for piece in pieces), ranks)
    return [
        [
            Slice(pieces[index].document, pieces[index].start + start, pieces[index].start + stop)
            for index, start, stop in held
        ]
        for held in planned
    ]
