"""A hierarchical exchange over several nodes: every row crosses to a node once and is handed on inside it.

In the first step a rank sends to ranks of its own node what they need, and to the rank that has its own place in
another node what any ranks there need; in the second step that rank hands it on. With nodes of three ranks, rank 1
sends

    first step     to 0 and 2, each what it needs            to 4: all that any of 3, 4, 5 needs
    second step                                              4 to 3 and 5: what each needs

Ranks of one place have their network cards on one rail of the fabric, as NCCL has it. Gradients go the same ways back:
the rank that handed rows on adds up what comes back to it, so that they cross once too.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import numpy as np

from .routes import Routes, StageTraffic, rows_of_slices
from .rows import Group, Rows, concatenated, row_numbers
from .stage import SecondStep


def hierarchical_routes(traffic: StageTraffic, rank: int) -> Routes:
    return _TwoSteps(traffic, rank).routes()


class _TwoSteps:
    """Both steps as one rank sees them. Rows are those of the rank that sends them in the first step."""

    def __init__(self, traffic: StageTraffic, rank: int):
        self._rank, self._traffic = rank, traffic
        self._ranks, self._size = range(traffic.plan.cp_size), traffic.plan.ranks_per_node
        self._needed = cache(lambda source, target: rows_of_slices(traffic.slices(source, target)))

    def routes(self) -> Routes:
        sent = [self._first_step(self._rank, target) for target in self._ranks]
        brought = [self._first_step(source, self._rank) for source in self._ranks]
        received, counts = self._traffic.received(self._rank)
        second_step = self._second_step(brought, counts)
        return Routes(concatenated(sent), _counts(sent), _counts(brought), received, second_step)

    def _first_step(self, source: int, target: int) -> np.ndarray:
        """Rows that the first step brings from `source` to `target`, ascending."""
        if target in self._node(source):
            return self._needed(source, target)
        if source in self._partners(target):
            return np.unique(concatenated([self._needed(source, other) for other in self._node(target)]))
        return row_numbers([])

    def _second_step(self, brought: list[np.ndarray], wanted: list[int]) -> SecondStep:
        """Given what the first step brings and how many tokens of each rank this one needs."""
        begins = [0, *accumulate(_counts(brought))]

        def places(source: int, target: int) -> np.ndarray:
            """Where the first step has put what `target` needs of `source`."""
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
        """The ranks that have a rank's place in other nodes."""
        return [other for other in self._ranks[rank % self._size :: self._size] if other != rank]

    def _by_rank(self, ranks: list[int], counts: list[int]) -> list[int]:
        """Counts of some ranks, in a list of all ranks."""
        found = dict(zip(ranks, counts))
        return [found.get(rank, 0) for rank in self._ranks]


def _counts(arrays: list[np.ndarray]) -> list[int]:
    return [len(array) for array in arrays]
