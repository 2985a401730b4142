"""`StageTraffic`: which tokens travel between ranks in one stage, and where a rank's slices and keys lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from .slices import Slice
from .traffic import Interval, overlaps


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


Needed = dict[int, dict[int, list[Interval]]]
"""The tokens of each document that each rank needs, `{document: {rank: intervals}}`, from
[`~traffic.needed_keys`]."""


class KeyPiece(NamedTuple):
    """The keys of `tokens` tokens of a document, beginning at token `start`, at row `offset` of a key buffer."""

    document: int
    start: int
    tokens: int
    offset: int = 0


class LocalSlice(NamedTuple):
    """Tokens [start, stop) of a document, which begin at row `row` of the sequence of the rank that holds them."""

    document: int
    start: int
    stop: int
    row: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def local_slices(slices: Iterable[Slice]) -> tuple[LocalSlice, ...]:
    """Return a rank's slices with the rows at which they begin in its sequence."""
    found, row = [], 0
    for document, start, stop in slices:
        found.append(LocalSlice(document, start, stop, row))
        row += stop - start
    return tuple(found)


def parts(slices: Iterable[Slice], intervals: Mapping[int, Sequence[Interval]]) -> Iterator[LocalSlice]:
    """Yield the parts of a rank's slices that lie within the intervals of their documents."""
    row = 0
    for document, start, stop in slices:
        if document in intervals:
            for first, last in overlaps(start, stop, intervals[document]):
                yield LocalSlice(document, first, last, row + first - start)
        row += stop - start


def key_pieces(slices: Iterable[LocalSlice], offset: int) -> Iterator[KeyPiece]:
    """Yield the key pieces of slices that lie one after the other in a key buffer, beginning at row `offset`."""
    for document, start, stop, _ in slices:
        yield KeyPiece(document, start, stop - start, offset)
        offset += stop - start


class StageTraffic:
    """The rows that ranks need from each other in the stage with the given ring offsets.

    `needed` holds the tokens that each rank needs in all stages together.
    """

    def __init__(self, plan: ShardPlan, offsets: Sequence[int], needed: Needed):
        self.plan, self._offsets, self._needed = plan, frozenset(offsets), needed
        self._needed_by = cache(lambda rank: {document: of[rank] for document, of in needed.items() if rank in of})

    def is_empty(self) -> bool:
        """Return whether no rank needs any rows in this stage."""
        return not any(
            self._meet(source, target) and overlaps(start, stop, intervals)
            for source, slices in enumerate(self.plan.slices)
            for document, start, stop in slices
            for target, intervals in self._needed.get(document, {}).items()
        )

    def slices(self, source: int, target: int) -> Iterator[LocalSlice]:
        """Return the tokens of `source` that `target` needs, with their rows on `source`."""
        return parts(self.plan.slices[source], self._needed_by(target) if self._meet(source, target) else {})

    def received(self, rank: int) -> tuple[list[KeyPiece], list[int]]:
        """Return the pieces that a rank needs, source by source, and the number of tokens from each source."""
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
