"""An exchange over several nodes: every row crosses to a node once and is handed on inside it.

In the first step a rank sends what ranks of its own node need to them, and what any ranks of another node need to the
one that has its own place there; in the second that one hands on. With nodes of three ranks, rank 1 sends

    first step     to 0 and 2, each what it needs            to 4: all that any of 3, 4, 5 needs
    second step                                              4 to 3 and 5: what each needs

Ranks of one place have their network cards on one rail of the fabric, as NCCL has it. Gradients go the same ways back:
the rank that handed on adds up what comes back to it, so that they cross once too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..plan import ShardPlan
from ..plan.traffic import Interval, overlaps
from .rows import Rows


Needed = dict[int, dict[int, list[Interval]]]
"""Of each document the tokens that each rank is sent, as [`~planning.volume.needed_keys`] finds them."""


class SecondStep(NamedTuple):
    """What a rank does in the second step, and with what both have brought.

    Attributes:
        handed_on (`Rows`): rows that the first step brought, for one rank of the node after the other.
        parts (`tuple[tuple[slice, Rows], ...]`): `handed_on` by rank; in a part no row comes twice.
        send_splits (`list[int]`): of `handed_on` for each rank of the group.
        recv_splits (`list[int]`): rows that the second step brings from each.
        needed (`Rows`): rows that the first step brought and the rank itself needs ...
        first (`Rows`): ... and which they are of all that it needs, source after source.
        second (`Rows`): which of all that it needs the second step brings, in its order.
    """

    handed_on: Rows
    parts: tuple[tuple[slice, Rows], ...]
    send_splits: list[int]
    recv_splits: list[int]
    needed: Rows
    first: Rows
    second: Rows

    def to(self, device: torch.device) -> SecondStep:
        return self._replace(
            **{name: getattr(self, name).to(device) for name in ("handed_on", "needed", "first", "second")},
            parts=tuple((part, rows.to(device)) for part, rows in self.parts),
        )


class HierarchicalRoutes:
    """The routes of one stage as one rank sees them.

    Args:
        plan (`ShardPlan`): with `ranks_per_node`.
        rank (`int`): rank within the context-parallel group.
        offsets: ring offsets of the stage.
        needed: by document and rank.

    Attributes:
        sent (`np.ndarray`): (n,) int64 packed positions of tokens that the rank sends in the first step, destination
            after destination.
        send_splits (`list[int]`): of them for each rank of the group.
        recv_splits (`list[int]`): rows that the first step brings from each.
        second_step (`SecondStep`): the second step.
    """

    def __init__(self, plan: ShardPlan, rank: int, offsets: Sequence[int], needed: Needed):
        self._plan, self._offsets, self._needed = plan, offsets, needed
        self._starts = np.concatenate(([0], np.cumsum(plan.lengths)))
        ranks, size = range(plan.cp_size), plan.ranks_per_node
        node = range(rank - rank % size, rank - rank % size + size)
        outgoing = [self._goes(rank, other) for other in ranks]
        sent = [
            outgoing[other] if other in node else self._union(outgoing, other) if (other - rank) % size == 0 else _NONE
            for other in ranks
        ]
        self.sent, self.send_splits = np.concatenate(sent), list(map(len, sent))
        # Tokens that the first step brings: from the own node what this rank needs, from its place in others a union.
        for_node: dict[int, list[np.ndarray]] = {
            source: [self._goes(source, other) for other in node]
            for source in ranks
            if source not in node and (source - rank) % size == 0
        }
        mine = [for_node[source][rank % size] if source in for_node else self._goes(source, rank) for source in ranks]
        unions = {source: np.unique(np.concatenate(parts)) for source, parts in for_node.items()}
        brought = [mine[source] if source in node else unions.get(source, _NONE) for source in ranks]
        self.recv_splits = list(map(len, brought))
        begins = np.concatenate(([0], np.cumsum(self.recv_splits)))
        self.second_step = self._second_step(rank, node, for_node, mine, brought, begins)

    def _second_step(self, rank, node, for_node, mine, brought, begins) -> SecondStep:
        size = len(node)

        def found(source: int, tokens: np.ndarray) -> np.ndarray:
            return begins[source] + np.searchsorted(brought[source], tokens)

        handed_on, send_splits = [], [0] * len(mine)
        for place, other in enumerate(node):
            if other != rank:
                rows = np.concatenate([_NONE, *(found(source, parts[place]) for source, parts in for_node.items())])
                handed_on.append(rows)
                send_splits[other] = len(rows)
        wanted = np.concatenate(([0], np.cumsum(list(map(len, mine)))))
        direct = [source for source in range(len(mine)) if source in node or source in for_node]
        through: list[list[int]] = [
            [source for source in range(len(mine)) if source not in node and (source - other) % size == 0]
            if other in node and other != rank
            else []
            for other in range(len(mine))
        ]
        ends = np.cumsum([0, *map(len, handed_on)])
        return SecondStep(
            handed_on=Rows(np.concatenate([_NONE, *handed_on])),
            parts=tuple(
                (slice(int(start), int(stop)), Rows(rows)) for start, stop, rows in zip(ends, ends[1:], handed_on)
            ),
            send_splits=send_splits,
            recv_splits=[sum(len(mine[source]) for source in sources) for sources in through],
            needed=Rows(np.concatenate([found(source, mine[source]) for source in direct])),
            first=Rows(_ranges(wanted, direct)),
            second=Rows(_ranges(wanted, [source for sources in through for source in sources])),
        )

    def _goes(self, source: int, target: int) -> np.ndarray:
        """Packed positions of the tokens of `source` that `target` needs, ascending."""
        if source == target or (target - source) % self._plan.cp_size not in self._offsets:
            return _NONE
        pieces = [
            np.arange(first, last) + self._starts[document]
            for document, start, stop in self._plan.slices[source]
            for first, last in overlaps(start, stop, self._needed.get(document, {}).get(target, ()))
        ]
        return np.concatenate([_NONE, *pieces])

    def _union(self, outgoing: list[np.ndarray], other: int) -> np.ndarray:
        """What any rank of another rank's node needs."""
        size = self._plan.ranks_per_node
        first = other - other % size
        return np.unique(np.concatenate(outgoing[first : first + size]))


_NONE = np.empty(0, dtype=np.int64)


def _ranges(begins: np.ndarray, which: Sequence[int]) -> np.ndarray:
    return np.concatenate([_NONE, *(np.arange(begins[index], begins[index + 1]) for index in which)])
