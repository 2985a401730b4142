"""Traffic of the hierarchical exchange, in which KV is sent to each node once and forwarded inside it.

Rows for another node go to the rank with the sender's local rank there (see `layout/hierarchical.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .link_traffic import CutSlices, Nodes, entry_links, full_links, window_entries
from .slice_table import SliceTable
from .slices import slices_by_document
from .traffic import by_link, needed_keys


if TYPE_CHECKING:
    from .shard_plan import ShardPlan
    from .slices import Slice


class _Runs(NamedTuple):
    """Runs of tokens, cut so that each run is needed as a whole by the same ranks."""

    senders: np.ndarray  # (n,) ranks that hold the runs
    counts: np.ndarray  # (n,) tokens of each run
    needs: np.ndarray  # (n, cp_size) whether each rank needs each run


def hierarchical_traffic(
    slices: Sequence[Sequence[Slice]],
    ranks_per_node: int,
    window: int | None = None,
    offsets: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Count the tokens whose K and V travel in each step of a layer's hierarchical exchange, in forward.

    Args:
        slices (`Sequence[Sequence[Slice]]`): the slices of each rank.
        ranks_per_node (`int`): number of ranks on a node.
        window (`int`, *optional*): sliding window in tokens; full attention if `None`.
        offsets (`Sequence[int]`, *optional*): ring offsets of the stage to count; all offsets if `None`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the traffic of the first and the second step, (cp_size, cp_size) int64 each,
        [sender][receiver].
    """
    cp_size = len(slices)
    place = np.arange(cp_size) % ranks_per_node
    node = np.arange(cp_size) // ranks_per_node
    offset = (np.arange(cp_size) - np.arange(cp_size)[:, None]) % cp_size
    allowed = offset > 0 if offsets is None else np.isin(offset, offsets)
    first, second = np.zeros((2, cp_size * cp_size))
    for senders, counts, needs in _runs(slices, window):
        needs = needs & allowed[senders]
        inside = needs & (node[senders][:, None] == node)
        crosses = needs & ~inside
        to_node = crosses.reshape(len(senders), -1, ranks_per_node).any(2)
        middle = np.arange(to_node.shape[1]) * ranks_per_node + place[senders][:, None]
        first += _sums(senders[:, None], np.arange(cp_size), counts[:, None] * inside, cp_size)
        first += _sums(senders[:, None], middle, counts[:, None] * to_node, cp_size)
        handing = node * ranks_per_node + place[senders][:, None]
        second += _sums(handing, np.arange(cp_size), counts[:, None] * crosses, cp_size)
    found = [traffic.reshape(cp_size, cp_size).astype(np.int64) for traffic in (first, second)]
    np.fill_diagonal(found[1], 0)
    return found[0], found[1]


def traffic_by_link(plan: ShardPlan, ranks_per_node: int, window: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Count the tokens whose K and V each rank receives and sends in the forward of one layer.

    Returns `(received, sent)`, (2, cp_size) each: inside the node and between nodes. The counts are those of the
    plan's own exchange, and include rows that a rank forwards to others.
    """
    if plan.ranks_per_node not in (None, ranks_per_node):
        return by_link(np.add(*hierarchical_traffic(plan.slices, plan.ranks_per_node, window)), ranks_per_node)
    nodes, hierarchical = Nodes(plan.cp_size, plan.cp_size, ranks_per_node), plan.ranks_per_node is not None
    if window is None:
        links = full_links(CutSlices.of(plan.slice_table), nodes, hierarchical)
    else:
        links = entry_links(window_entries(plan.slice_table, window), 1, nodes, hierarchical)[0]
    received, sent, (arriving, leaving) = links
    return np.array([received[0] + arriving, received[1]]), np.array([sent[0] + leaving, sent[1]])


def _sums(rows, columns, counts: np.ndarray, size: int) -> np.ndarray:
    places = np.broadcast_to(rows * size + columns, counts.shape)
    return np.bincount(places.ravel(), counts.ravel(), size * size)


def _runs(slices: Sequence[Sequence[Slice]], window: int | None) -> Iterator[_Runs]:
    """Yield the runs of all documents: with a window together, else those of each document that several ranks hold."""
    cp_size = len(slices)
    if window is not None:
        yield _window_runs(SliceTable.of(slices), window, cp_size)
        return
    for pieces in slices_by_document(slices).values():
        if len(pieces) > 1:
            # Every rank that holds a later slice needs the whole slice.
            starts, stops, senders = np.array(pieces).T
            last = np.full(cp_size, -1)
            np.maximum.at(last, senders, starts)
            yield _Runs(senders, stops - starts, last >= stops[:, None])


def _window_runs(table: SliceTable, window: int, cp_size: int) -> _Runs:
    """Cut all slices wherever the tokens that some rank needs begin or end."""
    held, needed = table.by_position, needed_keys(table, window)
    edges = np.unique(np.concatenate([*held.spans, *needed.spans]))
    change = np.zeros((len(edges), cp_size), dtype=np.int8)
    change[np.searchsorted(edges, needed.spans.starts), needed.ranks] += 1
    change[np.searchsorted(edges, needed.spans.stops), needed.ranks] -= 1
    holder = np.searchsorted(held.spans.starts, edges[:-1], "right") - 1
    inside = edges[:-1] < held.spans.stops[holder]
    needs = np.cumsum(change, axis=0, dtype=np.int8)[:-1] > 0
    return _Runs(held.ranks[holder][inside], np.diff(edges)[inside], needs[inside])
