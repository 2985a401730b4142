"""Traffic of the hierarchical exchange, in which KV crosses to each node once and is handed on inside it.

What a rank sends to another node goes to the rank that has its own place there (see `layout/hierarchical.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .slices import slices_by_document
from .traffic import by_link, needed_keys, overlaps


if TYPE_CHECKING:
    from .shard_plan import ShardPlan
    from .slices import Slice


class _Runs(NamedTuple):
    """Runs of a document's tokens that the same ranks need: (n,) ranks that hold them, (n,) tokens, and (n, cp_size)
    whether each rank needs them."""

    senders: np.ndarray
    counts: np.ndarray
    needs: np.ndarray


def hierarchical_traffic(
    slices: Sequence[Sequence[Slice]],
    ranks_per_node: int,
    window: int | None = None,
    offsets: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`(first, second)`, (cp_size, cp_size) int64 each: tokens whose K and V go from rank to rank, [sender][receiver],
    in either step of the forward of one layer, in the stage of some ring offsets if not all."""
    cp_size = len(slices)
    place = np.arange(cp_size) % ranks_per_node
    node = np.arange(cp_size) // ranks_per_node
    offset = (np.arange(cp_size) - np.arange(cp_size)[:, None]) % cp_size
    allowed = offset > 0 if offsets is None else np.isin(offset, offsets)
    first, second = np.zeros((2, cp_size * cp_size))
    for senders, counts, needs in _runs_by_document(slices, window):
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
    """`(received, sent)`, (2, cp_size) each: tokens whose K and V a rank gets and gives in the forward of one layer,
    inside its node and between nodes, by the plan's exchange; what a rank hands on included."""
    if plan.ranks_per_node is None:
        return by_link(plan.kv_traffic(window), ranks_per_node)
    return by_link(np.add(*hierarchical_traffic(plan.slices, plan.ranks_per_node, window)), ranks_per_node)


def _sums(rows, columns, counts: np.ndarray, size: int) -> np.ndarray:
    places = np.broadcast_to(rows * size + columns, counts.shape)
    return np.bincount(places.ravel(), counts.ravel(), size * size)


def _runs_by_document(slices: Sequence[Sequence[Slice]], window: int | None) -> Iterator[_Runs]:
    cp_size = len(slices)
    needed = needed_keys(slices, window) if window is not None else {}
    for document, pieces in slices_by_document(slices).items():
        if len(pieces) == 1:
            continue
        if window is None:
            # A slice is needed, all of it, where a later one is.
            starts, stops, senders = np.array(pieces).T
            last = np.full(cp_size, -1)
            np.maximum.at(last, senders, starts)
            yield _Runs(senders, stops - starts, last >= stops[:, None])
            continue
        by_rank = [needed[document].get(rank, ()) for rank in range(cp_size)]
        runs = [
            (sender, stop - start, [bool(overlaps(start, stop, intervals)) for intervals in by_rank])
            for first, last, sender in pieces
            for start, stop in _cut(first, last, needed[document])
        ]
        yield _Runs(*map(np.array, zip(*runs)))


def _cut(first: int, last: int, needed: dict[int, list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Cuts tokens [first, last) where what some rank needs of them begins or ends."""
    inner = {edge for of_rank in needed.values() for interval in of_rank for edge in interval if first < edge < last}
    edges = sorted({first, last, *inner})
    return list(zip(edges, edges[1:]))
