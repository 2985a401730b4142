"""Which rank holds which tokens of which document. Pure Python and NumPy: nothing here imports torch."""

from .plan import ShardPlan
from .strategies import STRATEGIES, plan_documents
from .volume import kv_bytes


__all__ = ["STRATEGIES", "ShardPlan", "kv_bytes", "plan_documents"]
