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

from functools import cache
from itertools import accumulate

import numpy as np

from ..plan.stage_traffic import StageTraffic
from .routes import Routes, rows_of_slices
from .rows import Group, Rows, concatenated, row_numbers
from .stage import SecondStep


def hierarchical_routes(traffic: StageTraffic, rank: int) -> Routes:
    """Return the routes of one rank's rows in a stage whose exchange is hierarchical."""
    return _TwoSteps(traffic, rank).routes()


class _TwoSteps:
    """Both steps of the exchange from the point of view of one rank.

    Row numbers are those of the rank that holds the rows and sends them in the first step.
    """

    def __init__(self, traffic: StageTraffic, rank: int):
        self._rank, self._traffic = rank, traffic
        self._ranks, self._size = range(traffic.plan.cp_size), traffic.plan.ranks_per_node
        self._needed = cache(lambda source, target: rows_of_slices(traffic.slices(source, target)))

    def routes(self) -> Routes:
        """Return the rank's routes."""
        sent = [self._first_step(self._rank, target) for target in self._ranks]
        brought = [self._first_step(source, self._rank) for source in self._ranks]
        received, counts = self._traffic.received(self._rank)
        second_step = self._second_step(brought, counts)
        return Routes(concatenated(sent), _counts(sent), _counts(brought), received, second_step)

    def _first_step(self, source: int, target: int) -> np.ndarray:
        """Return the rows that travel from `source` to `target` in the first step, ascending."""
        if target in self._node(source):
            return self._needed(source, target)
        if source in self._partners(target):
            return np.unique(concatenated([self._needed(source, other) for other in self._node(target)]))
        return row_numbers([])

    def _second_step(self, brought: list[np.ndarray], wanted: list[int]) -> SecondStep:
        """Return the second step, given the rows that the first step brings from each rank (`brought`) and the number
        of tokens of each rank that this rank needs (`wanted`)."""
        begins = [0, *accumulate(_counts(brought))]

        def places(source: int, target: int) -> np.ndarray:
            """Return where the first step has put the rows of `source` that `target` needs."""
            return begins[source] + np.searchsorted(brought[source], self._needed(source, target))

        node, partners = self._node(self._rank), self._partners(self._rank)
        others = [other for other in node if other != self._rank]
        handed_on = [concatenated([places(source, other) for source in partners]) for other in others]
        spans = accumulate(_counts(handed_on), initial=0)
        ends = [0, *accumulate(wanted)]
        direct = [source for source in self._ranks if source in node or source in partners]
        indirect = [source for other in others for source in self._partners(other)]
        return SecondStep(
            handed_on=Rows(concatenated(handed_on)),
            parts=tuple(Group(slice(start, start + len(rows)), Rows(rows)) for start, rows in zip(spans, handed_on)),
            send_splits=self._by_rank(others, _counts(handed_on)),
            recv_splits=self._by_rank(
                others, [sum(wanted[source] for source in self._partners(other)) for other in others]
            ),
            needed=Rows(concatenated([places(source, self._rank) for source in direct])),
            first=Rows(row_numbers((ends[source], ends[source + 1]) for source in direct)),
            second=Rows(row_numbers((ends[source], ends[source + 1]) for source in indirect)),
        )

    def _node(self, rank: int) -> range:
        first = rank - rank % self._size
        return range(first, first + self._size)

    def _partners(self, rank: int) -> list[int]:
        """Return the ranks of other nodes that have the same local rank."""
        return [other for other in self._ranks[rank % self._size :: self._size] if other != rank]

    def _by_rank(self, ranks: list[int], counts: list[int]) -> list[int]:
        """Return the counts of some ranks as a list over all ranks."""
        found = dict(zip(ranks, counts))
        return [found.get(rank, 0) for rank in self._ranks]


def _counts(arrays: list[np.ndarray]) -> list[int]:
    return [len(array) for array in arrays]
