"""Makes a `ShardPlan` from document lengths, by any strategy. Pure Python and NumPy: nothing here imports torch."""

from ..plan import ShardPlan, Topology, kv_bytes
from ..predict import HARDWARE, CostModel, HardwareProfile, StepTime
from .settings import DEFAULT_STRATEGY, STRATEGIES, PlanSettings
from .strategies import plan_documents, plan_with


__all__ = [
    "DEFAULT_STRATEGY",
    "HARDWARE",
    "STRATEGIES",
    "CostModel",
    "HardwareProfile",
    "PlanSettings",
    "ShardPlan",
    "StepTime",
    "Topology",
    "kv_bytes",
    "plan_documents",
    "plan_with",
]
