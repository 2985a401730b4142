"""Finds the hardware profile of a device by the name that PyTorch reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


_PROFILES = (
    (r"rtx 4090 laptop", None),  # a smaller chip
    (r"rtx 5090 laptop", None),
    (r"rtx 4090", "rtx4090"),
    (r"rtx 5090", "rtx5090"),
    (r"g?b200", "b200"),
    (r"h200", "h200"),
    (r"h100", "h100"),
    (r"a100", "a100"),
    (r"l40s", "l40s"),
    (r"mi3(00|25)x", "mi300x"),  # an MI325X has the same compute units, and more memory
)
"""Patterns of device names, most specific first. Variants share the profile of the usual form."""

UNKNOWN_GPU = "generic"
"""The profile for GPUs without a profile of their own."""


def packaged_hardware(name: str) -> str | None:
    """Return the name of the packaged profile for the GPU that PyTorch calls `name`, or `None`."""
    name = name.lower()  # matched by whole words, so that a GH200 is not taken for an H200
    return next((profile for pattern, profile in _PROFILES if re.search(rf"\b{pattern}\b", name)), None)


@dataclass(frozen=True)
class Surroundings:
    """The devices and nodes of a context-parallel group, as its first rank found them.

    Args:
        device (`str`): name of the GPU as PyTorch reports it, or a type of device, such as "cpu".
        ranks_per_node (`int`, *optional*): ranks on each node: all of them in one node, or those of several full
            nodes in order; `None` if the group is divided in another way.
    """

    device: str
    ranks_per_node: int | None

    @property
    def profile(self) -> str:
        """The name of the device's hardware profile."""
        return "cpu" if self.device == "cpu" else packaged_hardware(self.device) or UNKNOWN_GPU


def ranks_per_node(ranks: Sequence[int], local_world_size: int | None) -> int | None:
    """Return how many ranks of a group are on each of its nodes, or `None` if its ranks do not fill nodes in order.

    Args:
        ranks (`Sequence[int]`): the global ranks of the group's ranks.
        local_world_size (`int`, *optional*): processes per node. If it is unknown, the group counts as one node.
    """
    if local_world_size is None:
        return len(ranks)
    nodes = [rank // local_world_size for rank in ranks]
    if len(set(nodes)) == 1:
        return len(ranks)
    starts = range(0, len(ranks), local_world_size)
    in_order = all(len(set(nodes[start : start + local_world_size])) == 1 for start in starts)
    return local_world_size if in_order and len(ranks) % local_world_size == 0 else None
