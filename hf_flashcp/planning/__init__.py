"""Which rank holds which tokens of which document. Pure Python and NumPy: nothing here imports torch."""

from .plan import ShardPlan
from .strategies import DEFAULT_STRATEGY, STRATEGIES, plan_documents
from .volume import kv_bytes


__all__ = ["DEFAULT_STRATEGY", "STRATEGIES", "ShardPlan", "kv_bytes", "plan_documents"]
