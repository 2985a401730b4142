"""Index maps of one rank under a plan: its tokens, the rows to send and to receive, and which rows attend to which."""

from ..plan.rectangles import Rectangle
from .rank_layout import RankLayout
from .rank_plan import RankPlan
from .rows import Rows
from .stage import Stage


__all__ = ["RankLayout", "RankPlan", "Rectangle", "Rows", "Stage"]
