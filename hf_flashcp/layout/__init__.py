"""From a plan and a rank to index maps: the local row, what to send, what to receive, what attends to what."""

from .batch import shard_inputs
from .rank_layout import RankLayout, Rectangle, Stage
from .rank_plan import RankPlan


__all__ = ["RankLayout", "RankPlan", "Rectangle", "Stage", "shard_inputs"]
