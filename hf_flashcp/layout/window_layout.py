"""`WindowLayout`: the index maps of sliding-window layers.

A window counts distances inside the document, so the local slices of a document cannot be joined into one sequence as
for full attention: there are gaps between them. Each slice is attended to on its own, against its band of keys:

    window of 4; this rank holds [6,13) of a document, the rest is elsewhere

              keys  2 3 4 5 6 7 8 9 . . .
        6           . R R R L                      R  received: only [3,6) travels
        7           . . R R L L
        8           . . . R L L L
        9           . . . . L L L L
       10           . . . . . L L L L              rows from 9 on see local keys only

Rows near the start of a slice wait for the received part of their band; the others need nothing. No row is in both,
so nothing has to be merged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..plan import ShardPlan
from ..plan.calls import KeyPiece
from ..plan.traffic import overlaps
from .rank_layout import RankLayout, concatenated, grouped, rows_of
from .rows import Rows
from .stage import Rectangle, Stage


class Band(NamedTuple):
    """The first rows of a slice, up to token `stop`, and the keys that they see: tokens [start, stop)."""

    document: int
    start: int
    stop: int
    q_start: int
    q_stop: int


class WindowLayout(RankLayout):
    """Index maps of one rank under one plan, for layers whose queries see `window` keys, themselves included.

    There is one stage at most. Its rectangles and the local ones are causal, aligned bottom-right, with the window.

    Args:
        plan (`ShardPlan`): a valid plan.
        rank (`int`): rank within the context-parallel group.
        window (`int`): at least 1, in tokens: the `sliding_window` of transformers.
    """

    def __init__(self, plan: ShardPlan, rank: int, window: int):
        self.window = window
        super().__init__(plan, rank)

    @staticmethod
    def _offset_groups(plan: ShardPlan) -> Sequence[Sequence[int]]:
        return [range(1, plan.cp_size)]

    def _local_rectangles(self) -> tuple[Rectangle, ...]:
        rectangles = []
        for _, start, stop, row in self.slices:
            waiting = self._waiting_rows(start, stop)
            if start + waiting < stop:
                rectangles.append(Rectangle(row + waiting, row + stop - start, row, row + stop - start))
        return tuple(rectangles)

    def _waiting_rows(self, start: int, stop: int) -> int:
        """How many of a slice's first rows see keys before it."""
        return 0 if start == 0 else min(stop - start, self.window - 1)

    def _bands(self) -> list[Band]:
        bands = []
        for document, start, stop, row in self.slices:
            if waiting := self._waiting_rows(start, stop):
                bands.append(Band(document, max(0, start - self.window + 1), start + waiting, row, row + waiting))
        return bands

    def _stage(self, offsets: Sequence[int]) -> Stage:
        received, exchange = self._exchange(offsets)
        bands = self._bands()
        local_rows, local = self._local_keys(bands, offset=sum(piece.tokens for piece in received))
        sources = defaultdict(list)
        for piece in sorted([*received, *local]):
            sources[piece.document].append(piece)
        key_order, rectangles, key = [], [], 0
        for document, start, stop, q_start, q_stop in bands:
            for _, piece_start, count, offset in sources[document]:
                for first, last in overlaps(start, stop, [(piece_start, piece_start + count)]):
                    key_order.append(np.arange(offset + first - piece_start, offset + last - piece_start))
            rectangles.append(Rectangle(q_start, q_stop, key, key + stop - start))
            key += stop - start
        order = concatenated(key_order)
        return Stage(
            **exchange,
            local_rows=local_rows,
            key_order=Rows(order),
            order_groups=grouped(order),
            rectangles=tuple(rectangles),
            causal=True,
            rows=Rows(rows_of(rectangles)),
        )

    def _local_keys(self, bands: list[Band], offset: int) -> tuple[Rows, list[KeyPiece]]:
        """The rank's own rows that lie in bands, each once, and where they stand behind `offset` received ones."""
        covered: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for document, start, stop, _, _ in bands:
            intervals = covered[document]
            if intervals and start < intervals[-1][1]:
                start, _ = intervals.pop()
            intervals.append((start, stop))
        rows, pieces = [], []
        for document, start, stop, row in self.slices:
            for first, last in overlaps(start, stop, covered.get(document, ())):
                rows.append(np.arange(row + first - start, row + last - start))
                pieces.append(KeyPiece(document, first, last - first, offset))
                offset += last - first
        return Rows(concatenated(rows)), pieces
