"""The hierarchical exchange over several nodes: each row is sent to a node once and forwarded inside it.

In the first step a rank sends rows directly to the ranks of its own node that need them. Rows that any ranks of
another node need go to its partner there, the rank with the same local rank. In the second step the partner forwards
them. With three ranks per node, the rows of rank 1 travel like this:

    first step     from 1 to 0 and 2: the rows that each needs     from 1 to 4: all rows that 3, 4 or 5 needs
    second step                                                    from 4 to 3 and 5: the rows that each needs

Ranks with the same local rank have their network cards on the same rail of the fabric, as NCCL arranges it. Gradients
take the same routes back. The rank that forwarded rows sums the gradients that come back for them, so that gradients
cross between nodes once, too.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from ..plan.ranges import Ranges, runs
from ..plan.stage_traffic import Pieces, StageTraffic
from .parts import Parts
from .routes import Routes
from .rows import Rows
from .second_step import SecondStep


def hierarchical_routes(traffic: StageTraffic, rank: int) -> Routes:
    """Return the routes of one rank's rows in a stage whose exchange is hierarchical."""
    return _TwoSteps(traffic, rank).routes()


class _TwoSteps:
    """Both steps of the exchange from the point of view of one rank.

    Row numbers are those of the rank that holds the rows and sends them in the first step.
    """

    def __init__(self, traffic: StageTraffic, rank: int):
        self._rank, self._traffic, self._size = rank, traffic, traffic.plan.ranks_per_node
        self._cp_size = traffic.plan.cp_size
        first = rank - rank % self._size
        self._node = range(first, first + self._size)
        self._partners = self._partners_of(rank)

    def routes(self) -> Routes:
        """Return the rank's routes."""
        outgoing, received = self._traffic.sent(self._rank), self._traffic.received(self._rank)
        forwarded = self._traffic.forwarded(self._partners, self._node)
        inside = outgoing.receivers // self._size == self._rank // self._size
        partners = outgoing.receivers // self._size * self._size + self._rank % self._size
        sent = _RowsOfRanks(np.where(inside, outgoing.receivers, partners), outgoing.sender_rows, self._cp_size)
        of_node = received.select(received.senders // self._size == self._rank // self._size)
        first_step = Pieces.concatenated([of_node, forwarded])
        brought = _RowsOfRanks(first_step.senders, first_step.sender_rows, self._cp_size)
        second_step = self._second_step(brought, received, forwarded)
        return Routes(sent.rows, sent.counts, brought.counts, second_step)

    def _second_step(self, brought: _RowsOfRanks, received: Pieces, forwarded: Pieces) -> SecondStep:
        """Return the second step.

        Args:
            brought: the rows that the first step brings from each rank.
            received: the tokens that this rank needs.
            forwarded: the tokens of this rank's partners that its node needs.
        """
        others = [other for other in self._node if other != self._rank]
        passed = forwarded.select(forwarded.receivers != self._rank)
        forwarded_rows = Rows(brought.places(passed.senders, passed.sender_rows))
        send_splits = passed.tokens_by(passed.receivers, self._cp_size)
        ends = [0, *accumulate(send_splits)]
        wanted = received.tokens_by(received.senders, self._cp_size)
        recv_splits = [0] * self._cp_size
        for other in others:
            recv_splits[other] = sum(wanted[source] for source in self._partners_of(other))
        direct = sorted([*self._node, *self._partners])
        of_direct = received.select(np.isin(received.senders, direct))
        needed = Rows(brought.places(of_direct.senders, of_direct.sender_rows))
        by_destination = forwarded_rows.parts([slice(ends[other], ends[other + 1]) for other in others])
        return SecondStep(
            forwarded=forwarded_rows,
            send_splits=send_splits,
            recv_splits=recv_splits,
            needed=needed,
            first=Rows(_of_sources(wanted, direct)),
            second=Rows(_of_sources(wanted, [source for other in others for source in self._partners_of(other)])),
            sums=Parts([needed, *by_destination], sum(brought.counts)),
        )

    def _partners_of(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of other nodes that have the same local rank."""
        return tuple(other for other in range(rank % self._size, self._cp_size, self._size) if other != rank)


def _of_sources(wanted: list[int], sources: list[int]) -> Ranges:
    """Return where the rows of some sources lie among all rows that a rank needs, of which each source sends
    `wanted`."""
    ends = [0, *accumulate(wanted)]
    return Ranges.of((ends[source], ends[source + 1]) for source in sources)


class _RowsOfRanks:
    """The rows of several ranks, each of them once, by rank and ascending.

    Args:
        ranks (`np.ndarray`): a rank for each range, (n,) int64.
        rows (`Ranges`): ranges of its rows. They may overlap.
        cp_size (`int`): number of ranks.

    Attributes:
        rows (`Ranges`): the rows.
        counts (`list[int]`): number of rows of each rank.
    """

    def __init__(self, ranks: np.ndarray, rows: Ranges, cp_size: int):
        self._stride = int(rows.stops.max(initial=0)) + 1  # one line holds the rows of all ranks
        lifted = self._lifted(ranks, rows)
        lifted = lifted.select(np.argsort(lifted.starts, kind="stable"))
        reach = np.maximum.accumulate(lifted.stops)
        firsts, lasts = runs(lifted.starts[1:] > reach[:-1], len(reach))
        self._spans = Ranges(lifted.starts[firsts], reach[lasts])
        owners = self._spans.starts // self._stride
        self.rows = Ranges(self._spans.starts - owners * self._stride, self._spans.stops - owners * self._stride)
        self.counts: list[int] = np.bincount(owners, self.rows.lengths, cp_size).astype(np.int64).tolist()

    def places(self, ranks: np.ndarray, rows: Ranges) -> Ranges:
        """Return where ranges of rows of these ranks lie among all rows."""
        lifted, ends = self._lifted(ranks, rows), self._spans.lengths.cumsum()
        holders = np.searchsorted(self._spans.starts, lifted.starts, "right") - 1
        shift = ends[holders] - self._spans.stops[holders]
        return Ranges(lifted.starts + shift, lifted.stops + shift)

    def _lifted(self, ranks: np.ndarray, rows: Ranges) -> Ranges:
        return Ranges(rows.starts + ranks * self._stride, rows.stops + ranks * self._stride)
