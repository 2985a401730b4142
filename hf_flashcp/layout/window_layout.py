"""`WindowLayout`: the index maps of sliding-window layers.

A window counts distances inside the document, and there are gaps between the local slices of a document. So, unlike in
full attention, they cannot be joined into one sequence. Each slice attends to its own band of keys:

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
from typing import NamedTuple

from ..plan.calls import KeyPiece
from ..plan.traffic import Interval, overlaps
from .rank_layout import RankLayout, StageKeys
from .routes import LocalSlice, key_pieces, parts, rows_of_slices
from .rows import Rows, row_numbers
from .stage import Rectangle


class Band(NamedTuple):
    """The first rows of a slice, [q_start, q_stop), which wait for keys before the slice. They see tokens [start,
    stop) of the document."""

    document: int
    start: int
    stop: int
    q_start: int
    q_stop: int


class WindowLayout(RankLayout):
    """The index maps of one rank under a plan, for layers whose queries see `window` keys, their own included.

    The window is the `sliding_window` of transformers, in tokens, and at least 1. There is at most one stage. Its
    rectangles and the local ones apply the window under a causal mask, aligned bottom-right.
    """

    window: int

    def _local_rectangles(self) -> tuple[Rectangle, ...]:
        return tuple(
            Rectangle(piece.row + waiting, piece.row + piece.tokens, piece.row, piece.row + piece.tokens)
            for piece in self.slices
            if (waiting := self._waiting_rows(piece)) < piece.tokens
        )

    def _waiting_rows(self, piece: LocalSlice) -> int:
        """Return how many of a slice's first rows see keys before the slice."""
        return 0 if piece.start == 0 else min(piece.tokens, self.window - 1)

    def _bands(self) -> list[Band]:
        bands = []
        for piece in self.slices:
            if waiting := self._waiting_rows(piece):
                first = max(0, piece.start - self.window + 1)
                rows = piece.row, piece.row + waiting
                bands.append(Band(piece.document, first, piece.start + waiting, *rows))
        return bands

    def _stage_keys(self, received: Sequence[KeyPiece]) -> StageKeys:
        bands = self._bands()
        own = self._own_keys(bands)
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
        return StageKeys(tuple(rectangles), row_numbers(order), Rows(rows_of_slices(own)))

    def _own_keys(self, bands: Sequence[Band]) -> list[LocalSlice]:
        """Return the rank's own tokens that lie in bands, each of them once."""
        covered: dict[int, list[Interval]] = defaultdict(list)
        for document, start, stop, _, _ in bands:
            intervals = covered[document]
            if intervals and start < intervals[-1][1]:
                start, _ = intervals.pop()
            intervals.append((start, stop))
        return list(parts(self._plan.slices[self._rank], covered))
