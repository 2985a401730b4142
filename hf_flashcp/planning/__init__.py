"""From document lengths to a `ShardPlan`, by any strategy. Pure Python and NumPy: nothing here imports torch."""

from ..plan import ShardPlan, Topology, kv_bytes
from ..predict import HARDWARE, CostModel, HardwareProfile, StepTime
from .strategies import DEFAULT_STRATEGY, STRATEGIES, plan_documents


__all__ = [
    "DEFAULT_STRATEGY",
    "HARDWARE",
    "STRATEGIES",
    "CostModel",
    "HardwareProfile",
    "ShardPlan",
    "StepTime",
    "Topology",
    "kv_bytes",
    "plan_documents",
]
