"""Index maps of one rank under a plan: its tokens, the rows to send and to receive, and which rows attend to which."""

from ..plan.rectangles import Rectangle
from .parts import Parts
from .rank_layout import RankLayout
from .rank_plan import RankPlan
from .rows import Rows, accumulate_dtype
from .stage import Stage


__all__ = ["Parts", "RankLayout", "RankPlan", "Rectangle", "Rows", "Stage", "accumulate_dtype"]
