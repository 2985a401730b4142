"""Which rows travel between ranks in a stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from ..plan import ShardPlan, Slice
from ..plan.calls import KeyPiece
from ..plan.traffic import Interval, overlaps
from .rows import concatenated, row_numbers
from .stage import SecondStep


Needed = dict[int, dict[int, list[Interval]]]
"""By document and rank the tokens that the rank is sent, see [`~plan.traffic.needed_keys`]."""


class LocalSlice(NamedTuple):
    """Tokens [start, stop) of a document, from row `row` on of the sequence of the rank that holds them."""

    document: int
    start: int
    stop: int
    row: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def local_slices(slices: Iterable[Slice]) -> tuple[LocalSlice, ...]:
    """A rank's slices with the rows that they have in its sequence."""
    found, row = [], 0
    for document, start, stop in slices:
        found.append(LocalSlice(document, start, stop, row))
        row += stop - start
    return tuple(found)


def parts(slices: Iterable[Slice], intervals: Mapping[int, Sequence[Interval]]) -> Iterator[LocalSlice]:
    """Yields the parts of a rank's slices that lie in the intervals of their documents."""
    row = 0
    for document, start, stop in slices:
        if document in intervals:
            for first, last in overlaps(start, stop, intervals[document]):
                yield LocalSlice(document, first, last, row + first - start)
        row += stop - start


def rows_of_slices(slices: Iterable[LocalSlice]) -> np.ndarray:
    """(n,) int64 local rows, slice after slice."""
    return row_numbers((row, row + stop - start) for _, start, stop, row in slices)


def key_pieces(slices: Iterable[LocalSlice], offset: int) -> Iterator[KeyPiece]:
    """Yields the places of slices that lie one behind the other in a buffer of keys, from its row `offset` on."""
    for document, start, stop, _ in slices:
        yield KeyPiece(document, start, stop - start, offset)
        offset += stop - start


class StageTraffic:
    """What ranks need of one another in the stage with these ring offsets; `needed` is what each is sent in all."""

    def __init__(self, plan: ShardPlan, offsets: Sequence[int], needed: Needed):
        self.plan, self._offsets, self._needed = plan, frozenset(offsets), needed
        self._needed_by = cache(lambda rank: {document: of[rank] for document, of in needed.items() if rank in of})

    def is_empty(self) -> bool:
        return not any(
            self._meet(source, target) and overlaps(start, stop, intervals)
            for source, slices in enumerate(self.plan.slices)
            for document, start, stop in slices
            for target, intervals in self._needed.get(document, {}).items()
        )

    def slices(self, source: int, target: int) -> Iterator[LocalSlice]:
        """What `target` needs of the tokens of `source`, with the rows of `source`."""
        return parts(self.plan.slices[source], self._needed_by(target) if self._meet(source, target) else {})

    def received(self, rank: int) -> tuple[list[KeyPiece], list[int]]:
        """What a rank needs, source after source, and how many tokens of each source."""
        pieces: list[KeyPiece] = []
        counts = []
        offset = 0
        for source in range(self.plan.cp_size):
            pieces += key_pieces(self.slices(source, rank), offset)
            end = pieces[-1].offset + pieces[-1].tokens if pieces else 0
            counts.append(end - offset)
            offset = end
        return pieces, counts

    def _meet(self, source: int, target: int) -> bool:
        return (target - source) % self.plan.cp_size in self._offsets


class Routes(NamedTuple):
    """How the rows of one stage travel to and from one rank; the splits are those of the first step of two."""

    sent: np.ndarray  # (n,) int64 local rows that the rank sends, destination after destination
    send_splits: list[int]
    recv_splits: list[int]
    received: list[KeyPiece]  # what the rank needs, source after source
    second_step: SecondStep | None = None


def direct_routes(traffic: StageTraffic, rank: int) -> Routes:
    """Every row goes from the rank that holds it to each that needs it."""
    sent = [rows_of_slices(traffic.slices(rank, target)) for target in range(traffic.plan.cp_size)]
    received, counts = traffic.received(rank)
    return Routes(concatenated(sent), [len(rows) for rows in sent], counts, received)
