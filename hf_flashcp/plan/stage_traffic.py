"""`StageTraffic`: which tokens travel between ranks in each stage of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .ranges import Ranges, overlaps, runs, stable_order
from .slice_table import SliceTable
from .traffic import NeededKeys, needed_keys


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


class Pieces(NamedTuple):
    """Runs of tokens that travel from one rank to another."""

    senders: np.ndarray  # (n,) int64
    receivers: np.ndarray  # (n,) int64
    spans: Ranges  # positions of a [`SliceTable`]
    rows: np.ndarray  # (n,) int64, the row of the sender's sequence at which each run begins

    def select(self, which: np.ndarray) -> Pieces:
        """Return some of the pieces, given by their indices or a mask."""
        return Pieces(self.senders[which], self.receivers[which], self.spans.select(which), self.rows[which])

    @property
    def sender_rows(self) -> Ranges:
        """The rows of each run in its sender's sequence."""
        return Ranges(self.rows, self.rows + self.spans.lengths)

    @classmethod
    def concatenated(cls, parts: Sequence[Pieces]) -> Pieces:
        """Return all pieces of several parts, of which there is at least one."""
        senders, receivers, spans, rows = zip(*parts)
        joined = Ranges.concatenated(spans)
        return cls(np.concatenate(senders), np.concatenate(receivers), joined, np.concatenate(rows))

    def tokens_by(self, ranks: np.ndarray, cp_size: int) -> list[int]:
        """Return how many tokens belong to each rank, where `ranks` has the rank of each run."""
        return np.bincount(ranks, self.spans.lengths, cp_size).astype(np.int64).tolist()


class LayerTraffic:
    """The tokens that ranks need from each other in one layer, in all of its stages together.

    Args:
        plan (`ShardPlan`): a valid plan.
        needed (`NeededKeys`): what each rank needs.
    """

    def __init__(self, plan: ShardPlan, needed: NeededKeys):
        self.plan, self._needed = plan, needed
        self._sent: dict[int, Pieces] = {}
        self._received: dict[int, Pieces] = {}
        self._forwarded: dict[tuple[tuple[int, ...], range], Pieces] = {}

    def sent(self, rank: int) -> Pieces:
        """Return what other ranks need of `rank`, by receiver, then in order of positions."""
        if rank not in self._sent:
            self._sent[rank] = _pieces(self._needed, self.plan.slice_table.of_rank(rank))
        return self._sent[rank]

    def received(self, rank: int) -> Pieces:
        """Return what `rank` needs of other ranks, by sender, then in order of positions."""
        if rank not in self._received:
            needed = self._needed.of_ranks(range(rank, rank + 1))
            pieces = _pieces(needed, self.plan.slice_table.by_position)
            self._received[rank] = pieces.select(stable_order(pieces.senders))
        return self._received[rank]

    def forwarded(self, senders: tuple[int, ...], receivers: range) -> Pieces:
        """Return what each of the receivers needs of each of the senders, by receiver, sender and position."""
        if (senders, receivers) not in self._forwarded:
            needed, table = self._needed.of_ranks(receivers), self.plan.slice_table
            pieces = Pieces.concatenated([_pieces(needed, table.of_rank(sender)) for sender in senders])
            self._forwarded[senders, receivers] = pieces.select(stable_order(pieces.receivers))
        return self._forwarded[senders, receivers]


class StageTraffic:
    """The part of a layer's traffic that travels in the stage with the given ring offsets."""

    def __init__(self, layer: LayerTraffic, offsets: Sequence[int]):
        self.plan, self._layer = layer.plan, layer
        self._meets = np.isin(np.arange(layer.plan.cp_size), offsets)

    def sent(self, rank: int) -> Pieces:
        """Return the stage's part of [`LayerTraffic.sent`]."""
        return self._of_stage(self._layer.sent(rank))

    def received(self, rank: int) -> Pieces:
        """Return the stage's part of [`LayerTraffic.received`]."""
        return self._of_stage(self._layer.received(rank))

    def forwarded(self, senders: tuple[int, ...], receivers: range) -> Pieces:
        """Return the stage's part of [`LayerTraffic.forwarded`]."""
        return self._of_stage(self._layer.forwarded(senders, receivers))

    def _of_stage(self, pieces: Pieces) -> Pieces:
        if self._meets[1:].all():
            return pieces
        return pieces.select(self._meets[(pieces.receivers - pieces.senders) % self.plan.cp_size])


def stage_traffic(plan: ShardPlan, window: int | None = None) -> list[StageTraffic]:
    """Return the traffic of each stage in which some rank needs keys."""
    needed = needed_keys(plan.slice_table, window)
    if not len(needed.ranks):
        return []
    layer = LayerTraffic(plan, needed)
    groups = plan.stage_offsets if window is None else [range(1, plan.cp_size)]
    return [StageTraffic(layer, offsets) for offsets in (groups if len(groups) == 1 else _used(plan, groups))]


def _pieces(needed: NeededKeys, held: SliceTable) -> Pieces:
    """Return the tokens in ascending slices that other ranks need, in the order of `needed`, then of positions."""
    found = overlaps(needed.spans, held.spans)
    senders, receivers = held.ranks[found.second], needed.ranks[found.first]
    rows = held.rows[found.second] + found.common.starts - held.spans.starts[found.second]
    return Pieces(senders, receivers, found.common, rows).select(np.flatnonzero(senders != receivers))


def _used(plan: ShardPlan, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
    """Yield the groups of ring offsets at which some full-attention layer's KV travels.

    Of each document, a rank sends to those whose last slice begins after its own first slice.
    """
    table = plan.slice_table
    shared = np.bincount(table.documents)[table.documents] > 1
    documents, ranks, starts = table.documents[shared], table.ranks[shared], table.spans.starts[shared]
    numbers = np.unique(documents, return_inverse=True)[1]
    firsts, lasts = runs(np.diff(documents) | np.diff(ranks), len(starts))
    first = np.full((numbers.max(initial=0) + 1, plan.cp_size), np.iinfo(np.int64).max)
    first[numbers[firsts], ranks[firsts]] = starts[firsts]
    last = np.full_like(first, -1)
    last[numbers[lasts], ranks[lasts]] = starts[lasts]
    for offsets in groups:
        if any((first < np.roll(last, -offset, axis=1)).any() for offset in offsets):
            yield offsets
