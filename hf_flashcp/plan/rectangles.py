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

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .slices import Slice
from .stage_traffic import KeyPiece, LocalSlice, StageTraffic, key_pieces, local_slices, parts
from .traffic import Interval, needed_keys, overlaps


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
    after the other, taken from the received keys followed by the keys of `own`, tokens that the rank holds itself.
    """

    rectangles: tuple[Rectangle, ...]
    order: list[Interval] | None = None
    own: Sequence[LocalSlice] | None = None


def local_rectangles(slices: Sequence[LocalSlice], window: int | None = None) -> tuple[Rectangle, ...]:
    """Return the rectangles of a rank that need no exchange. They are causal and aligned bottom-right.

    In full attention there is one square per document, and with a window there is one rectangle per slice.
    """
    if window is not None:
        return tuple(
            Rectangle(piece.row + waiting, piece.row + piece.tokens, piece.row, piece.row + piece.tokens)
            for piece in slices
            if (waiting := _waiting_rows(piece, window)) < piece.tokens
        )
    squares: dict[int, Rectangle] = {}
    for piece in slices:
        first = squares[piece.document].q_start if piece.document in squares else piece.row
        stop = piece.row + piece.tokens
        squares[piece.document] = Rectangle(first, stop, first, stop)
    return tuple(squares.values())


def stage_keys(slices: Sequence[LocalSlice], received: Sequence[KeyPiece], window: int | None = None) -> StageKeys:
    """Return a rank's rectangles for the keys that it receives in one stage.

    In full attention they have no mask. With a window, under which there is one stage, they are causal and aligned
    bottom-right.
    """
    return _full_stage(slices, received) if window is None else _banded_stage(slices, received, window)


def rank_rectangles(
    plan: ShardPlan, window: int | None = None
) -> list[tuple[tuple[Rectangle, ...], list[tuple[Rectangle, ...]]]]:
    """Return the rectangles of each rank's local pass and of each of its stages that brings keys."""
    window = plan.hiding_window(window)
    stages = stage_traffic(plan, window)
    found = []
    for rank, of_rank in enumerate(plan.slices):
        slices = local_slices(of_rank)
        waiting = [stage_keys(slices, stage.received(rank)[0], window).rectangles for stage in stages]
        found.append((local_rectangles(slices, window), [rectangles for rectangles in waiting if rectangles]))
    return found


def stage_traffic(plan: ShardPlan, window: int | None = None) -> list[StageTraffic]:
    """Return the traffic of each stage in which some rank needs keys."""
    needed = needed_keys(plan.slices, window)
    groups = plan.stage_offsets if window is None else [range(1, plan.cp_size)]
    stages = [StageTraffic(plan, offsets, needed) for offsets in groups]
    return [stage for stage in stages if not stage.is_empty()]


def key_ranges(arrived: Sequence[KeyPiece], slices: Sequence[Slice]) -> list[tuple[int, int]] | None:
    """Return, for each slice, the range of buffer rows that holds the keys before it.

    The range is `(0, 0)` for a slice that needs no keys. The result is `None` if the keys of any slice are not in one
    contiguous range. The arrived pieces lie in the buffer in the given order (their `offset` is ignored), and no piece
    extends across the start of a slice.
    """
    pieces: dict[int, list[KeyPiece]] = defaultdict(list)
    offset = 0
    for document, start, tokens, _ in arrived:
        pieces[document].append(KeyPiece(document, start, tokens, offset))
        offset += tokens
    found = []
    for document, start, _ in slices:
        before = [piece for piece in pieces.get(document, ()) if piece.start < start]
        if not before:
            found.append((0, 0))
            continue
        first, last = min(piece.offset for piece in before), before[-1].offset + before[-1].tokens
        if last - first != sum(piece.tokens for piece in before):
            return None
        found.append((first, last))
    return found


def _full_stage(slices: Sequence[LocalSlice], received: Sequence[KeyPiece]) -> StageKeys:
    own = [Slice(document, start, stop) for document, start, stop, _ in slices]
    order, ranges = None, key_ranges(received, own)
    if ranges is None:
        in_order = sorted(received)
        order = [(offset, offset + tokens) for _, _, tokens, offset in in_order]
        ranges = key_ranges(in_order, own)
        assert ranges is not None
    rectangles: list[Rectangle] = []
    for piece, keys in zip(slices, ranges):
        if keys[0] == keys[1]:
            continue
        first = piece.row
        if rectangles and rectangles[-1].q_stop == first and rectangles[-1][2:] == keys:
            first = rectangles.pop().q_start
        rectangles.append(Rectangle(first, piece.row + piece.tokens, *keys))
    return StageKeys(tuple(rectangles), order)


class _Band(NamedTuple):
    """The first rows of a slice, [q_start, q_stop), which wait for keys before the slice. They see tokens [start,
    stop) of the document."""

    document: int
    start: int
    stop: int
    q_start: int
    q_stop: int


def _waiting_rows(piece: LocalSlice, window: int) -> int:
    """Return how many of a slice's first rows see keys before the slice."""
    return 0 if piece.start == 0 else min(piece.tokens, window - 1)


def _banded_stage(slices: Sequence[LocalSlice], received: Sequence[KeyPiece], window: int) -> StageKeys:
    bands = [
        _Band(piece.document, max(0, piece.start - window + 1), piece.start + rows, piece.row, piece.row + rows)
        for piece in slices
        if (rows := _waiting_rows(piece, window))
    ]
    own = _own_keys(slices, bands)
    pieces: dict[int, list[KeyPiece]] = defaultdict(list)
    for piece in sorted([*received, *key_pieces(own, sum(piece.tokens for piece in received))]):
        pieces[piece.document].append(piece)
    order, rectangles, key = [], [], 0
    for document, start, stop, q_start, q_stop in bands:
        for piece in pieces[document]:
            shift = piece.offset - piece.start
            for first, last in overlaps(start, stop, [(piece.start, piece.start + piece.tokens)]):
                order.append((first + shift, last + shift))
        rectangles.append(Rectangle(q_start, q_stop, key, key + stop - start))
        key += stop - start
    return StageKeys(tuple(rectangles), order, own)


def _own_keys(slices: Sequence[LocalSlice], bands: Sequence[_Band]) -> list[LocalSlice]:
    """Return the rank's own tokens that lie in bands, each of them once."""
    covered: dict[int, list[Interval]] = defaultdict(list)
    for document, start, stop, _, _ in bands:
        intervals = covered[document]
        if intervals and start < intervals[-1][1]:
            start, _ = intervals.pop()
        intervals.append((start, stop))
    return list(parts((Slice(document, start, stop) for document, start, stop, _ in slices), covered))
