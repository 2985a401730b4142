"""`Topology`: which ranks share a node, and how much dearer the way to other nodes is."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass

from ..errors import PlanError


INTER_NODE_COST = 7.7
"""370 GB/s over NVLink against 48 GB/s over a 400 Gb/s card, as the hardware profile "h100" has them."""

_MOST_RANKS = 2**31 - 1


@dataclass(frozen=True)
class Topology:
    """Ranks in nodes: ranks r of a context-parallel group with equal r // ranks_per_node share one.

    That holds where the group's ranks are consecutive processes from the first of a node on, as those of
    [`FlashCPPlugin`]'s mesh are (its dimension "cp" is the innermost) if cp_size is a multiple of the processes that
    a node has. A group that is smaller than a node is taken to lie in one.

    Args:
        ranks_per_node (`int`): ranks of a full node.
        inter_node_cost (`float`, *optional*, defaults to 7.7): how many times longer a row takes between nodes than
            inside one: the bandwidth of a rank's link inside its node over that of its link to others. The default is
            that of H100s (370 over 48 GB/s).

    Raises:
        PlanError: no positive whole number of ranks, or a cost below 1.
    """

    ranks_per_node: int
    inter_node_cost: float = INTER_NODE_COST

    def __post_init__(self):
        if type(self.ranks_per_node) is not int or not 1 <= self.ranks_per_node <= _MOST_RANKS:
            raise PlanError(
                f"ranks_per_node must be a whole number from 1 to {_MOST_RANKS:,}, got "
                f"{reprlib.repr(self.ranks_per_node)}."
            )
        cost = self.inter_node_cost
        if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not 1 <= cost < math.inf:
            raise PlanError(
                f"inter_node_cost is {cost!r}: it says how many times longer a row takes between nodes than inside "
                "one, a number not below 1."
            )

    def require_full_nodes(self, cp_size: int) -> None:
        """Raises unless so many ranks lie in one node or fill several."""
        if cp_size > self.ranks_per_node and cp_size % self.ranks_per_node:
            raise PlanError(
                f"cp_size {cp_size} is no multiple of the topology's {self.ranks_per_node} ranks_per_node: its nodes "
                "would not be full. Make it a multiple, or at most one node's ranks, or leave topology out."
            )


def check_topology(topology: Topology, cp_size: int) -> None:
    """Raises a `PlanError` if it is none, or so many ranks do not fill its nodes."""
    if not isinstance(topology, Topology):
        raise PlanError(f"topology is {reprlib.repr(topology)}: make one by Topology(ranks_per_node).")
    topology.require_full_nodes(cp_size)
