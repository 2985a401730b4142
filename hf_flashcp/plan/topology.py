"""`Topology`: which ranks share a node, and how much slower links between nodes are."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass

from ..errors import PlanError


INTER_NODE_COST = 7.7
"""Default cost of links between nodes: 370 GB/s over NVLink, divided by 48 GB/s over a 400 Gb/s network card. Both are
from the hardware profile "h100"."""

_MOST_RANKS = 2**31 - 1


@dataclass(frozen=True)
class Topology:
    """The nodes of a context-parallel group: ranks r with equal r // ranks_per_node share a node.

    This describes a group whose ranks are consecutive processes, beginning with the first process of a node. The
    groups of [`FlashCPPlugin`]'s mesh are like that if cp_size is a multiple of the number of processes per node,
    because "cp" is its innermost dimension. A group smaller than a node is assumed to lie within one node.

    Args:
        ranks_per_node (`int`): number of ranks on a full node.
        inter_node_cost (`float`, *optional*, defaults to 7.7): how many times longer a row takes between nodes than
            inside a node. This is the bandwidth of a rank's link inside its node, divided by that of its link to other
            nodes. The default is the ratio for H100s (370 GB/s to 48 GB/s).

    Raises:
        PlanError: `ranks_per_node` is not a positive whole number, or the cost is below 1.
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
                f"inter_node_cost is {cost!r}: it must be a number of at least 1. It says how many times longer a row "
                "takes between nodes than inside a node."
            )

    def require_full_nodes(self, cp_size: int) -> None:
        """Raise a `PlanError` unless `cp_size` ranks lie within one node or fill several nodes."""
        if cp_size > self.ranks_per_node and cp_size % self.ranks_per_node:
            raise PlanError(
                f"cp_size {cp_size} is not a multiple of the topology's ranks_per_node, {self.ranks_per_node}, so one "
                "node would not be full. Choose a multiple, or at most one node's ranks, or leave topology out."
            )


def check_topology(topology: Topology, cp_size: int) -> None:
    """Raise a `PlanError` if `topology` is not a `Topology`, or if `cp_size` ranks do not fill its nodes."""
    if not isinstance(topology, Topology):
        raise PlanError(f"topology is {reprlib.repr(topology)}, not a Topology: pass Topology(ranks_per_node).")
    topology.require_full_nodes(cp_size)
