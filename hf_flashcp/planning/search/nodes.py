"""Strategy "search" with a `Topology`: little on the slower links between nodes.

Two kinds of plans are tried beside the flat one, which knows no nodes. The flat one's ranks, grouped so that those
which share documents share a node. And plans in two levels: the search shares documents out to nodes, each a rank with
the budgets of all of its ranks; then each node shares out what it holds. A document that is cut between nodes lies on
all ranks of each of them, zigzag, so that they share what crosses; whole documents are planned by the flat search.
"""

from __future__ import annotations

import numpy as np

from ...plan.hierarchical_traffic import hierarchical_traffic
from ...plan.slices import Slice, Slices, attention_pairs, rank_pairs, rank_tokens
from ...plan.topology import Topology
from ...plan.traffic import by_link, traffic_matrix
from ..caps import Caps
from ..sharding import per_doc
from .candidates import Candidate, Candidates
from .search import search
from .settings import SETTINGS


BASES = ((SETTINGS[0], 0.9), (SETTINGS[2], 0.6))
"""Settings of the plans of nodes that are made first, and how much of what the user allows above 1 is their cap on
attention pairs: the rest is room for the ranks of a node."""

TARGETS = ((0.6, 2.5), (0.7, 4.0), (0.5, 4.0))
"""Shares of what a base's busiest node receives and sends that plans like it should have at most, and how much low
positions are spread in them: in the order of what each adds to those before it, on drawn packs, as the bases are."""

MANY = 1000
"""Documents beyond which only the first of each is made."""


def search_in_nodes(caps: Caps, topology: Topology) -> Slices:
    """Slices of every rank: of the plans tried, within the caps, the one whose busiest links take the shortest when
    rows cross to each node once, a row between nodes counted `inter_node_cost` times. Never busier than [`search`]'s,
    nor less balanced than that where it does not meet the caps. With all ranks in one node, or each in its own, the
    plan is `search`'s. Pure and deterministic."""
    flat = search(caps)
    found = [flat, *node_plans(flat, caps, topology.ranks_per_node)]
    return min(found, key=lambda slices: busiest(slices, topology))


def busiest(slices: Slices, topology: Topology) -> tuple[float, float]:
    """What the busiest link of any rank carries in the first step of the exchange and in the second, in or out, and
    all links together: tokens whose KV travels, between nodes times `inter_node_cost`."""
    first, second = hierarchical_traffic(slices, min(topology.ranks_per_node, len(slices)))
    received, sent = by_link(first, topology.ranks_per_node)
    cost = np.array([[1.0], [topology.inter_node_cost]])
    handed_on = max(second.sum(0).max(), second.sum(1).max())
    return float((cost * np.maximum(received, sent)).max() + handed_on), float((cost * received).sum() + second.sum())


def node_plans(flat: Slices, caps: Caps, ranks_per_node: int) -> list[Slices]:
    """Plans that spare the links between nodes: a flat plan's ranks grouped, and one in two levels, if that is within
    the caps or no less balanced. None where ranks do not fill several nodes of several ranks."""
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
    """Plans of documents on nodes, as if each were one rank."""
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
    """Moves slices between ranks: each trades places with the one that spares most traffic between nodes, if any."""
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


def _inside(held: list[Slice], ranks: int, caps: Caps) -> Slices:
    """What a node holds, on its ranks: zigzag what is cut, and all of it where the rest cannot be planned."""
    whole = [piece for piece in held if piece.tokens == caps.lengths[piece.document]]
    slices = _zigzag([piece for piece in held if piece.tokens < caps.lengths[piece.document]], ranks)
    planned = _whole_inside(whole, slices, caps)
    if planned is None:
        slices = _zigzag(held, ranks)
    else:
        # Ranks with a token less of what is cut get one more of the others.
        tokens = rank_tokens(slices)
        planned.sort(key=lambda pieces: -sum(stop - start for _, start, stop in pieces))
        for rank, pieces in zip(sorted(range(ranks), key=tokens.__getitem__), planned):
            slices[rank] += [Slice(whole[index].document, start, stop) for index, start, stop in pieces]
    return slices


def _whole_inside(whole: list[Slice], beside: Slices, caps: Caps) -> Slices | None:
    """A plan of a node's whole documents, numbered as in `whole`, on its ranks, which hold others `beside` them."""
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
