"""Which rank holds which tokens of which document. Pure Python and NumPy: nothing here imports torch."""

from .cost import CostModel, StepTime
from .hardware_profile import HARDWARE, HardwareProfile
from .plan import ShardPlan
from .strategies import DEFAULT_STRATEGY, STRATEGIES, plan_documents
from .topology import Topology
from .volume import kv_bytes


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
