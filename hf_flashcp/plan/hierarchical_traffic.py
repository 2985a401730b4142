"""Traffic of the hierarchical exchange, in which KV is sent to each node once and forwarded inside it.

Rows for another node go to the rank with the sender's local rank there (see `layout/hierarchical.py`).
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
    """Runs of a document's tokens, cut so that each run is needed as a whole by the same ranks."""

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
    """Count the tokens whose K and V each rank receives and sends in the forward of one layer.

    Returns `(received, sent)`, (2, cp_size) each: inside the node and between nodes. The counts are those of the
    plan's own exchange, and include rows that a rank forwards to others.
    """
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
            # Every rank that holds a later slice needs the whole slice.
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
    """Cut tokens [first, last) wherever the tokens that some rank needs begin or end."""
    inner = {edge for of_rank in needed.values() for interval in of_rank for edge in interval if first < edge < last}
    edges = sorted({first, last, *inner})
    return list(zip(edges, edges[1:]))
