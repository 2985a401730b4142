"""Counts what each rank moves in a full-attention or a recurrent layer, from the arrays of a plan.

The counts are those of [`~traffic.full_attention_traffic`] and [`~contracted.states_moved`], without loops over
slices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .link_traffic import CutSlices, Nodes, full_links
from .ranges import Ranges, overlaps
from .slice_table import SliceTable
from .traffic import NeededKeys, needed_keys


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


Moved = tuple[tuple[int, ...], tuple[int, ...]]
"""`(received, sent)`, a count per rank each."""


def kv_moved(plan: ShardPlan) -> Moved:
    """Count the tokens whose KV each rank receives and sends in the forward of a full-attention layer."""
    return _in_one_node(plan, CutSlices.of(plan.slice_table))


def window_moved(plan: ShardPlan, window: int) -> Moved:
    """Count the tokens whose KV each rank receives and sends in the forward of a layer with a sliding window.

    A token is sent once per range of needed keys that holds it, except to its own rank.
    """
    table, cp_size = plan.slice_table, plan.cp_size
    needed = needed_keys(table, window)
    own = _own_tokens(table, needed, cp_size)
    # Positions that ascend are found several times faster.
    ascending = table.by_position.spans
    copies = _needed_before(needed.spans, ascending.stops) - _needed_before(needed.spans, ascending.starts)
    received = _sums(needed.ranks, needed.spans.lengths, cp_size) - own
    sent = plan.columns.sums(table.holders.in_table(copies)) - own
    return tuple(received.tolist()), tuple(sent.tolist())


def states_moved(plan: ShardPlan, *, backwards: bool = False) -> Moved:
    """Count the slices whose states each rank receives and sends in the forward of a recurrent layer.

    With `backwards` these are the gradients of states in its backward.
    """
    return _in_one_node(plan, CutSlices.of(plan.slice_table).contracted(backwards))


def rank_pairs(plan: ShardPlan, window: int | None = None) -> list[int]:
    """Return the number of attention pairs of each rank, see [`~slices.attention_pairs`]."""
    _, _, starts, stops = plan.columns
    if window is None:
        return plan.columns.sums((stops - starts) * (stops + starts + 1) // 2).tolist()
    inside = np.clip(window, starts, stops)  # queries from here on see a whole window
    pairs = (inside - starts) * (inside + starts + 1) // 2 + (stops - inside) * window
    return plan.columns.sums(pairs).tolist()


def _in_one_node(plan: ShardPlan, slices: CutSlices) -> Moved:
    links = full_links(slices, Nodes(plan.cp_size, plan.cp_size, plan.cp_size), hierarchical=False)
    return tuple(links.received[0].tolist()), tuple(links.sent[0].tolist())


def _own_tokens(table: SliceTable, needed: NeededKeys, cp_size: int) -> np.ndarray:
    """Return how many of the tokens that each rank needs it holds itself, (cp_size,) int64."""
    length = int(table.spans.stops.max(initial=0))  # one line per rank, one after the other
    lines = [
        Ranges(*(edge + ranks * length for edge in spans)) for ranks, spans in (needed, (table.ranks, table.spans))
    ]
    found = overlaps(*lines)
    return _sums(needed.ranks[found.first], found.common.lengths, cp_size)


def _needed_before(spans: Ranges, positions: np.ndarray) -> np.ndarray:
    """Return how many tokens the spans, which may overlap, have before each position, (n,) int64."""
    total = np.zeros(len(positions), dtype=np.int64)
    for sign, edges in zip((1, -1), spans):
        edges = np.sort(edges)
        before = np.searchsorted(edges, positions)
        total += sign * (before * positions - np.append(0, edges.cumsum())[before])
    return total


def _sums(ranks: np.ndarray, values: np.ndarray, cp_size: int) -> np.ndarray:
    """Return the sum of the values of each rank, (cp_size,) int64, for ranks that ascend."""
    edges = np.searchsorted(ranks, np.arange(cp_size + 1))
    return np.diff(np.append(0, values.cumsum())[edges])
