"""Plans: which rank holds which tokens of each document, and what that costs. Pure Python and NumPy."""

from .shard_plan import ShardPlan
from .slices import Slice, Slices
from .topology import Topology
from .traffic import kv_bytes


__all__ = ["ShardPlan", "Slice", "Slices", "Topology", "kv_bytes"]
