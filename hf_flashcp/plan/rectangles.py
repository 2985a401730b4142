"""`Rectangle`: queries and keys that one kernel call multiplies, and the rectangles of each rank under a plan.

In full attention a rank's slices of a document, in order, form one causal sequence: every local query attends to every
local key at or before it, even if tokens between the slices are on other ranks. The keys that are missing lie strictly
before a local slice, so that attention to them needs no mask:

    document of 12 tokens, this rank holds a = [2,4) and b = [7,10):

              keys  0 1 2 3 4 5 6 7 8 9 . .
    a   2           R R L . . . . . . .            L  local causal sequence (a, b): one kernel call
        3           R R L L . . . . . .            R  received: rows of a x prefix [0,2),
    b   7           R R L L R R R L . .               rows of b x prefix [0,2)+[4,7): two full rectangles
        8           R R L L R R R L L .
        9           R R L L R R R L L L

KV arrives rank by rank, and the rows of each rank arrive in document order. Without a mask the order of keys does not
matter, so a slice can use keys where they arrived if all keys that it needs are in one range. This is always so when a
stage brings tokens of a document from a single rank, and often when one long document is spread over all ranks:

    A document has 12 tokens: this rank holds 2 3, a = 6 and b = 10 11, a second rank 0 1 7 8 9, and a third 4 5.
    Slice b needs all received tokens, slice a needs 0 1 4 5.

    one stage       0 1 7 8 9 | 4 5        the keys of b are in one range, those of a are not: gather the stage's keys
    two stages      0 1 7 8 9              both find their keys in one range in each stage, and merge once per stage
                    4 5

If the keys of any slice of a stage are not in one range, all keys of the stage are gathered into document order. The
gather moves each received row of K and V once in forward and once in backward. The alternative, one rectangle per
source, would merge every query row once more per source. With four query heads per KV head and fp32 accumulators that
moves several times as many bytes.

A sliding window counts distances inside the document, and there are gaps between the local slices of a document. So
with a window they cannot be joined into one sequence. Each slice attends to its own band of keys:

    window of 4; this rank holds [6,13) of a document, other ranks hold the rest

              keys  2 3 4 5 6 7 8 9 . . .
        6           . R R R L                      R  received: only [3,6) travels
        7           . . R R L L
        8           . . . R L L L
        9           . . . . L L L L
       10           . . . . . L L L L              rows from 9 on see local keys only

Rows near the start of a slice wait for the received part of their band. All other rows need local keys only. No row
belongs to both kinds, so no results have to be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .ranges import Ranges, overlaps, runs
from .slice_table import SliceTable
from .stage_traffic import Pieces, stage_traffic


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


class Rectangle(NamedTuple):
    """Attention of queries [q_start, q_stop) to keys [k_start, k_stop): rows of two buffers, never empty."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.q_stop - self.q_start

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.k_stop - self.k_start


class StageKeys(NamedTuple):
    """The rectangles of a rank in one stage, and the keys that they address.

    Without an `order`, these are the received keys. Otherwise they are the rows in the ranges of `order`, one range
    after the other, taken from the received keys followed by the keys of `own`, rows that the rank holds itself.
    """

    rectangles: tuple[Rectangle, ...]
    order: Ranges | None = None
    own: Ranges | None = None


def local_rectangles(slices: SliceTable, window: int | None = None) -> tuple[Rectangle, ...]:
    """Return the rectangles of a rank that need no exchange. They are causal and aligned bottom-right.

    In full attention there is one square per document, and with a window there is one rectangle per slice.
    """
    starts, stops = slices.query_rows
    if window is not None:
        first = starts + _waiting_rows(slices, window)
        inside = first < stops
        return _rectangles(Ranges(first, stops).select(inside), Ranges(starts, stops).select(inside))
    firsts, lasts = runs(np.diff(slices.documents), len(starts))
    squares = Ranges(starts[firsts], stops[lasts])
    return _rectangles(squares, squares)


def stage_keys(slices: SliceTable, received: Pieces, window: int | None = None) -> StageKeys:
    """Return a rank's rectangles for the keys that it receives in one stage, which arrive in the order of `received`.

    In full attention they have no mask. With a window, under which there is one stage, they are causal and aligned
    bottom-right.
    """
    return _full_stage(slices, received.spans) if window is None else _banded_stage(slices, received.spans, window)


def query_rows(rectangles: Sequence[Rectangle]) -> Ranges:
    """Return the rows of the queries of rectangles."""
    return Ranges.of(rectangle[:2] for rectangle in rectangles)


def rank_rectangles(
    plan: ShardPlan, window: int | None = None
) -> list[tuple[tuple[Rectangle, ...], list[tuple[Rectangle, ...]]]]:
    """Return the rectangles of each rank's local pass and of each of its stages that brings keys."""
    window = plan.hiding_window(window)
    stages = stage_traffic(plan, window)
    found = []
    for rank in range(plan.cp_size):
        slices = plan.slice_table.of_rank(rank)
        waiting = [stage_keys(slices, stage.received(rank), window).rectangles for stage in stages]
        found.append((local_rectangles(slices, window), [rectangles for rectangles in waiting if rectangles]))
    return found


def _rectangles(queries: Ranges, keys: Ranges) -> tuple[Rectangle, ...]:
    return tuple(starmap(Rectangle, zip(*(edge.tolist() for edge in (*queries, *keys)))))


class KeyRanges(NamedTuple):
    """Where the slices of a rank find the keys before them in one full-attention stage."""

    needs: np.ndarray  # (n,) int64, indices of the slices that need keys
    keys: Ranges  # (n,) their keys, among the received rows or, with an order, the ordered rows
    order: Ranges | None  # ranges of received rows in document order, if the keys of some slice are not in one range


def key_ranges(slices: SliceTable, received: Ranges) -> KeyRanges:
    """Return the key rows of each of a rank's slices, for pieces that arrive in the order of `received`.

    No piece extends across the start of a slice.
    """
    in_order = np.argsort(received.starts, kind="stable")
    arrived = _buffer_rows(received.lengths).select(in_order)
    ordered = _buffer_rows(arrived.lengths)
    # Each slice needs the pieces [first, before) of the document order.
    before, first = (np.searchsorted(received.starts[in_order], edge) for edge in (slices.spans.starts, slices.bases))
    needs = np.flatnonzero(first < before)
    first, last = first[needs], before[needs] - 1
    gathered = Ranges(ordered.starts[first], ordered.stops[last])
    keys = _first_and_last(arrived, first, last)
    if (keys.lengths == gathered.lengths).all():
        return KeyRanges(needs, keys, None)
    return KeyRanges(needs, gathered, arrived)


def _full_stage(slices: SliceTable, received: Ranges) -> StageKeys:
    needs, keys, order = key_ranges(slices, received)
    return StageKeys(_joined(slices.query_rows.select(needs), keys), order)


def _first_and_last(arrived: Ranges, first: np.ndarray, last: np.ndarray) -> Ranges:
    """Return the least start and the greatest stop of pieces [first, last], for which `first` is the document's first
    piece."""
    begins = np.zeros(len(arrived.starts), dtype=np.int64)
    begins[first] = arrived.stops.max(initial=0)
    lift = begins.cumsum()  # separates documents, so that one running maximum serves all of them
    low, high = np.minimum.accumulate(arrived.starts - lift) + lift, np.maximum.accumulate(arrived.stops + lift) - lift
    return Ranges(low[last], high[last])


def _joined(queries: Ranges, keys: Ranges) -> tuple[Rectangle, ...]:
    """Return the rectangles, after joining slices that attend to the same keys, which are adjacent."""
    differ = (keys.starts[1:] != keys.starts[:-1]) | (keys.stops[1:] != keys.stops[:-1])
    firsts, lasts = runs(differ, len(keys.starts))
    return _rectangles(Ranges(queries.starts[firsts], queries.stops[lasts]), keys.select(firsts))


def _buffer_rows(lengths: np.ndarray) -> Ranges:
    """Return the rows of pieces of these lengths that lie one after the other in a buffer."""
    stops = lengths.cumsum()
    return Ranges(stops - lengths, stops)


def _waiting_rows(slices: SliceTable, window: int) -> np.ndarray:
    """Return how many of each slice's first rows see keys before the slice, (n,) int64."""
    return np.where(slices.spans.starts > slices.bases, np.minimum(slices.spans.lengths, window - 1), 0)


def _banded_stage(slices: SliceTable, received: Ranges, window: int) -> StageKeys:
    # The first rows of a slice, which wait for keys before it, see the positions of a band.
    rows = _waiting_rows(slices, window)
    waits = np.flatnonzero(rows)
    waiting, rows = slices.select(waits), rows[waits]
    starts = waiting.spans.starts
    bands = Ranges(np.maximum(waiting.bases, starts - window + 1), starts + rows)
    own = overlaps(_united(bands), slices.spans)
    own_rows = slices.rows[own.second] + own.common.starts - slices.spans.starts[own.second]
    pieces = Ranges.concatenated([received, own.common])
    ascending = np.argsort(pieces.starts, kind="stable")
    buffered, pieces = _buffer_rows(pieces.lengths).select(ascending), pieces.select(ascending)
    seen = overlaps(bands, pieces)
    shift = (buffered.starts - pieces.starts)[seen.second]
    order = Ranges(seen.common.starts + shift, seen.common.stops + shift)
    rectangles = _rectangles(Ranges(waiting.rows, waiting.rows + rows), _buffer_rows(bands.lengths))
    return StageKeys(rectangles, order, Ranges(own_rows, own_rows + own.common.lengths))


def _united(bands: Ranges) -> Ranges:
    """Return the positions in any of the bands, whose starts and stops ascend, as disjoint ranges."""
    firsts, lasts = runs(bands.starts[1:] >= bands.stops[:-1], len(bands.starts))
    return Ranges(bands.starts[firsts], bands.stops[lasts])
