"""Traffic of each rank inside its node and between nodes, for one or several plans at once.

No array has an entry per pair of ranks, so that plans for thousands of ranks can be counted. The counts follow from
sums over the slices of a document, in the order of its tokens:

- A rank receives all tokens before its last slice, except its own.
- A slice is sent to every other rank whose last slice comes later.
- In a hierarchical exchange ([`hierarchical_traffic`]), a slice is sent to every other node whose last slice comes
  later. The rank with the sender's place in that node receives it and forwards it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .ranges import Ranges, overlaps
from .slice_table import SliceTable
from .traffic import needed_keys


MOST_PAIRS = 1 << 22
"""The most pairs of slices that are looked at together when the stages of a plan are counted."""


class Nodes:
    """The nodes of all ranks of several plans. The ranks of a plan fill its nodes in order.

    Args:
        num_ranks (`int`): number of ranks of all plans together.
        cp_size (`int`): number of ranks of each plan.
        ranks_per_node (`int`): number of ranks on a full node.

    Attributes:
        node (`np.ndarray`): the node of each rank, (num_ranks,).
        place (`np.ndarray`): its place in the node, (num_ranks,).
    """

    def __init__(self, num_ranks: int, cp_size: int, ranks_per_node: int):
        self.num_ranks, self.size = num_ranks, min(ranks_per_node, cp_size)
        plan, within = np.divmod(np.arange(num_ranks), cp_size)
        self.node = plan * -(-cp_size // self.size) + within // self.size
        self.place = within % self.size
        self.several = cp_size > self.size


class LinkTraffic(NamedTuple):
    """Tokens whose KV each rank moves in a layer's forward.

    In the first step, or the only one, `received` and `sent` count tokens inside nodes and between nodes, (2, ranks)
    each. `forwarded` counts the tokens that are received and sent in the second step of a hierarchical exchange,
    (2, ranks).
    """

    received: np.ndarray
    sent: np.ndarray
    forwarded: np.ndarray

    @classmethod
    def none(cls, num_ranks: int) -> LinkTraffic:
        """Return the traffic of plans that move nothing."""
        return cls(*(np.zeros((2, num_ranks), dtype=np.int64) for _ in range(3)))


class _Groups:
    """Values in groups, in which they keep their order.

    Args:
        keys (`np.ndarray`): the group of each value, (n,) int64.
    """

    def __init__(self, keys: np.ndarray):
        self.order = np.argsort(keys, kind="stable")
        in_order = keys[self.order]
        begins = np.flatnonzero(np.concatenate(([True], in_order[1:] != in_order[:-1])))
        ends = np.append(begins[1:], len(keys))
        self._first, self._last = np.repeat(begins, ends - begins), np.repeat(ends - 1, ends - begins)
        self.last = np.zeros(len(keys), dtype=bool)
        """Whether each value is the last one of its group."""
        self.last[self.order[ends - 1]] = True

    def before(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of the values before each one in its group."""
        in_order = values[self.order]
        sums = in_order.cumsum() - in_order
        return self._unsorted(sums - sums[self._first])

    def after(self, flags: np.ndarray) -> np.ndarray:
        """Return the number of flags after each one in its group."""
        sums = flags[self.order].cumsum()
        return self._unsorted(sums[self._last] - sums)

    def _unsorted(self, values: np.ndarray) -> np.ndarray:
        found = np.empty_like(values)
        found[self.order] = values
        return found


class CutSlices(NamedTuple):
    """The slices of documents that are cut, document by document, in the order of their tokens."""

    documents: np.ndarray  # (n,) int64, ascending
    ranks: np.ndarray  # (n,) int64
    tokens: np.ndarray  # (n,) int64

    @classmethod
    def of(cls, table: SliceTable) -> CutSlices:
        """Return the slices of a table of maximal slices."""
        table = table.by_position
        cut = np.flatnonzero(np.bincount(table.documents)[table.documents] > 1)
        return cls(table.documents[cut], table.ranks[cut], table.spans.lengths[cut])

    def contracted(self, backwards: bool = False) -> CutSlices:
        """Return slices of one token each, see [`contracted`], of documents that are read `backwards` if so."""
        ones = np.ones_like(self.tokens)
        if not backwards:
            return CutSlices(self.documents, self.ranks, ones)
        return CutSlices(self.documents.max(initial=0) - self.documents[::-1], self.ranks[::-1], ones)


def full_links(slices: CutSlices, nodes: Nodes, hierarchical: bool) -> LinkTraffic:
    """Count the traffic of a full-attention layer whose KV travels in a single stage."""
    documents, ranks, tokens = slices
    if not len(tokens):
        return LinkTraffic.none(nodes.num_ranks)
    by_document, by_rank = _Groups(documents), _Groups(documents * nodes.num_ranks + ranks)
    last = by_rank.last
    before, own = by_document.before(tokens), by_rank.before(tokens)
    sent = by_document.after(last) - ~last
    if nodes.several:
        by_node = _Groups(documents * nodes.num_ranks + nodes.node[ranks])
        before_inside, sent_inside = by_node.before(tokens), by_node.after(last) - ~last
    else:
        before_inside, sent_inside = before, sent
    received = _sums(ranks, (before_inside - own) * last, nodes), _sums(ranks, (before - before_inside) * last, nodes)
    sent = _sums(ranks, sent_inside * tokens, nodes), _sums(ranks, (sent - sent_inside) * tokens, nodes)
    if not (hierarchical and nodes.several):
        return LinkTraffic(np.array(received), np.array(sent), np.zeros((2, nodes.num_ranks), dtype=np.int64))
    to_nodes = by_document.after(by_node.last) - ~by_node.last
    arriving, second = _through_nodes(slices, nodes, by_rank, by_node)
    first_sent = _sums(ranks, to_nodes * tokens, nodes)
    return LinkTraffic(np.array([received[0], arriving]), np.array([sent[0], first_sent]), second)


def _through_nodes(
    slices: CutSlices, nodes: Nodes, by_rank: _Groups, by_node: _Groups
) -> tuple[np.ndarray, np.ndarray]:
    """Return what each rank receives from other nodes in the first step, (ranks,), and what it receives and sends in
    the second step, (2, ranks)."""
    documents, ranks, tokens = slices
    of_rank = np.flatnonzero(by_rank.last)
    # What each rank needs of the ranks with each place in other nodes.
    place, end = np.arange(nodes.size), of_rank[:, None]
    document, handing = documents[end], ranks[end] - nodes.place[ranks[end]] + place
    everywhere = _tokens_before(documents * nodes.size + nodes.place[ranks], tokens)
    on_ranks = _tokens_before(documents * nodes.num_ranks + ranks, tokens)
    needed = everywhere(document * nodes.size + place, end) - on_ranks(document * nodes.num_ranks + handing, end)
    first = needed * by_node.last[end]
    passed_on = needed * (place != nodes.place[ranks[end]])
    second = _sums(ranks[of_rank], passed_on.sum(1), nodes), _sums(handing.ravel(), passed_on.ravel(), nodes)
    return _sums(handing.ravel(), first.ravel(), nodes), np.array(second)


def _tokens_before(keys: np.ndarray, tokens: np.ndarray):
    """Return a function of a key and an index that returns the sum of the tokens before the index with that key."""
    order = np.argsort(keys, kind="stable")
    span = len(keys) + 1
    places, sums = keys[order] * span + order, np.append(0, tokens[order].cumsum())

    def before(key: np.ndarray, index: np.ndarray) -> np.ndarray:
        found = [np.searchsorted(places, key * span + limit) for limit in (index, 0)]
        return sums[found[0]] - sums[found[1]]

    return before


def _sums(ranks: np.ndarray, tokens: np.ndarray, nodes: Nodes) -> np.ndarray:
    return np.bincount(ranks, tokens, nodes.num_ranks).astype(np.int64)


class Entries(NamedTuple):
    """Tokens that travel from one rank to another in a stage. Ranges of the same sender may overlap."""

    stages: np.ndarray  # (n,) int64
    senders: np.ndarray  # (n,) int64
    receivers: np.ndarray  # (n,) int64
    spans: Ranges  # positions of a [`SliceTable`]


def entry_links(entries: Entries, num_stages: int, nodes: Nodes, hierarchical: bool) -> list[LinkTraffic]:
    """Count the traffic of each stage from what travels between each two ranks."""
    stages, senders, receivers, spans = entries
    inside, tokens = nodes.node[senders] == nodes.node[receivers], spans.lengths
    place = (2 * stages + ~inside) * nodes.num_ranks

    def counted(where: np.ndarray, values: np.ndarray) -> np.ndarray:
        sums = np.bincount(where, values, num_stages * 2 * nodes.num_ranks).astype(np.int64)
        return sums.reshape(num_stages, 2, nodes.num_ranks)

    if not hierarchical:
        forwarded = np.zeros((num_stages, 2, nodes.num_ranks), dtype=np.int64)
        return [
            LinkTraffic(*parts)
            for parts in zip(counted(place + receivers, tokens), counted(place + senders, tokens), forwarded)
        ]
    handing = receivers - nodes.place[receivers] + nodes.place[senders]
    arriving = np.where(inside, receivers, handing)
    order, new = _new_tokens((stages * nodes.num_ranks + senders) * nodes.num_ranks + arriving, spans)
    first = [counted(place[order] + ranks[order], new) for ranks in (arriving, senders)]
    again = tokens * (arriving != receivers)
    second = [
        counted((2 * stages + way) * nodes.num_ranks + ranks, again) for way, ranks in enumerate((receivers, handing))
    ]
    return [LinkTraffic(*parts) for parts in zip(*first, sum(second))]


def _new_tokens(keys: np.ndarray, spans: Ranges) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of keys and starts, and how many tokens of each span no earlier span with its key has."""
    order = np.argsort(keys * (spans.stops.max(initial=0) + 1) + spans.starts)
    starts, stops, keys = spans.starts[order], spans.stops[order], keys[order]
    lift = np.cumsum(np.append(0, keys[1:] != keys[:-1])) * (stops.max(initial=0) + 1)
    reached = np.append(0, np.maximum.accumulate(stops + lift)[:-1])[: len(stops)] - lift
    return order, np.maximum(stops - np.maximum(starts, reached), 0)


def window_entries(table: SliceTable, window: int) -> Entries:
    """Return what travels in a layer with a sliding window."""
    needed, held = needed_keys(table, window), table.by_position
    found = overlaps(needed.spans, held.spans)
    senders, receivers = held.ranks[found.second], needed.ranks[found.first]
    other = np.flatnonzero(senders != receivers)
    senders, receivers = senders[other], receivers[other]
    return Entries(np.zeros_like(senders), senders, receivers, found.common.select(other))


def slice_pairs(documents: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the indices `(later, earlier)` of each two slices of a document, in parts of about [`MOST_PAIRS`].

    `documents` are those of the slices, ascending.
    """
    first = np.searchsorted(documents, documents)
    indices = np.arange(len(documents))
    ends = (indices - first).cumsum()
    edges = np.searchsorted(ends, np.arange(1, ends[-1] // MOST_PAIRS + 1) * MOST_PAIRS) if len(ends) else []
    parts = []
    for some in np.split(indices, np.unique(edges)):
        earlier = Ranges(first[some], some)
        parts.append((np.repeat(some, earlier.lengths), earlier.numbers()))
    return parts


class Staged(NamedTuple):
    """What full-attention layers exchange in each stage.

    `keys` holds how many keys of other ranks each of the [`CutSlices`] attends to in each stage, (n, stages).
    """

    keys: np.ndarray
    entries: Entries


def staged_entries(slices: CutSlices, stage_of: np.ndarray) -> Staged:
    """Divide the traffic of full-attention layers into stages.

    Args:
        slices (`CutSlices`): the slices of one or several plans.
        stage_of (`np.ndarray`): the stage of each ring offset in each plan, (plans, cp_size) int64.
    """
    documents, ranks, tokens = slices
    cp_size, num_stages = stage_of.shape[1], int(stage_of.max()) + 1
    last = _Groups(documents * stage_of.size + ranks).last if len(ranks) else np.zeros(0, dtype=bool)
    ends = tokens.cumsum()
    keys = np.zeros(len(ranks) * num_stages, dtype=np.int64)
    found = []
    for later, earlier in slice_pairs(documents):
        other = ranks[later] != ranks[earlier]
        later, earlier = later[other], earlier[other]
        receivers, senders, moved = ranks[later], ranks[earlier], tokens[earlier]
        stages = stage_of[receivers // cp_size, (receivers - senders) % cp_size]
        keys += np.bincount(later * num_stages + stages, moved, len(keys)).astype(np.int64)
        once = np.flatnonzero(last[later])
        stops = ends[earlier[once]]
        found.append((stages[once], senders[once], receivers[once], stops - moved[once], stops))
    columns = [np.concatenate(column) for column in zip(*found)] if found else [np.zeros(0, dtype=np.int64)] * 5
    stages, senders, receivers, starts, stops = columns
    return Staged(keys.reshape(-1, num_stages), Entries(stages, senders, receivers, Ranges(starts, stops)))


def rank_traffic(slices: CutSlices, cp_size: int, plans: int) -> np.ndarray:
    """Return the tokens whose KV travels between each two ranks, (plans, cp_size, cp_size), [sender][receiver]."""
    entries = staged_entries(slices, np.zeros((plans, cp_size), dtype=np.int64)).entries
    place = entries.senders * cp_size + entries.receivers % cp_size
    traffic = np.bincount(place, entries.spans.lengths, plans * cp_size * cp_size)
    return traffic.reshape(plans, cp_size, cp_size)
