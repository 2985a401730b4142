"""Which rows travel between ranks in a stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from ..plan import ShardPlan, Slice
from ..plan.calls import KeyPiece
from ..plan.traffic import Interval, overlaps
from .rows import row_numbers
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
        """Number of tokens."""
        return self.stop - self.start


def local_slices(slices: Iterable[Slice]) -> tuple[LocalSlice, ...]:
    """A rank's slices with the rows that they have in its sequence."""
    found, row = [], 0
    for document, start, stop in slices:
        found.append(LocalSlice(document, start, stop, row))
        row += stop - start
    return tuple(found)


def parts(slices: Iterable[LocalSlice], intervals: Mapping[int, Sequence[Interval]]) -> list[LocalSlice]:
    """The parts of slices that lie in the intervals of their documents."""
    found = []
    for document, start, stop, row in slices:
        for first, last in overlaps(start, stop, intervals.get(document, ())):
            found.append(LocalSlice(document, first, last, row + first - start))
    return found


def rows_of_slices(slices: Iterable[LocalSlice]) -> np.ndarray:
    """(n,) int64 local rows, slice after slice."""
    return row_numbers((row, row + stop - start) for _, start, stop, row in slices)


def key_pieces(slices: Iterable[LocalSlice], offset: int = 0) -> list[KeyPiece]:
    """Where slices stand that lie one behind the other in a buffer of keys, from its row `offset` on."""
    pieces = []
    for document, start, stop, _ in slices:
        pieces.append(KeyPiece(document, start, stop - start, offset))
        offset += stop - start
    return pieces


class StageTraffic:
    """What ranks need of one another in one stage.

    Args:
        plan (`ShardPlan`): a valid plan.
        offsets (`Sequence[int]`): the ring offsets of the stage.
        needed (`Needed`): what each rank is sent in all stages.
    """

    def __init__(self, plan: ShardPlan, offsets: Sequence[int], needed: Needed):
        self.plan, self._offsets, self._needed = plan, frozenset(offsets), needed
        self._held = cache(lambda rank: local_slices(plan.slices[rank]))
        self._needed_by = cache(lambda rank: {document: of[rank] for document, of in needed.items() if rank in of})

    def is_empty(self) -> bool:
        """Whether no rank needs anything."""
        return not any(
            self._meet(source, target) and overlaps(start, stop, intervals)
            for source, slices in enumerate(self.plan.slices)
            for document, start, stop in slices
            for target, intervals in self._needed.get(document, {}).items()
        )

    def slices(self, source: int, target: int) -> list[LocalSlice]:
        """What `target` needs of the tokens of `source`, with the rows of `source`."""
        return parts(self._held(source), self._needed_by(target)) if self._meet(source, target) else []

    def _meet(self, source: int, target: int) -> bool:
        return (target - source) % self.plan.cp_size in self._offsets


class Routes(NamedTuple):
    """How the rows of one stage travel to and from one rank.

    Attributes:
        sent (`np.ndarray`): (n,) int64 local rows that the rank sends (in the first step), destination after
            destination.
        send_splits (`list[int]`): rows of `sent` for each rank of the group.
        recv_splits (`list[int]`): rows that arrive (in the first step) from each.
        received (`list[KeyPiece]`): what the rank needs, source after source.
        second_step (`SecondStep`, *optional*): the second step of a hierarchical exchange.
    """

    sent: np.ndarray
    send_splits: list[int]
    recv_splits: list[int]
    received: list[KeyPiece]
    second_step: SecondStep | None


def direct_routes(traffic: StageTraffic, rank: int) -> Routes:
    """Every row goes from the rank that holds it to each that needs it."""
    ranks = range(traffic.plan.cp_size)
    sent = [traffic.slices(rank, target) for target in ranks]
    received = [traffic.slices(source, rank) for source in ranks]
    return Routes(
        rows_of_slices(piece for pieces in sent for piece in pieces),
        [_tokens(pieces) for pieces in sent],
        [_tokens(pieces) for pieces in received],
        key_pieces(piece for pieces in received for piece in pieces),
        None,
    )


def _tokens(slices: Iterable[LocalSlice]) -> int:
    return sum(stop - start for _, start, stop, _ in slices)
