"""From a plan and a rank to index maps: the local row, what to send, what to receive, what attends to what."""

from .rank_layout import RankLayout
from .rank_plan import RankPlan
from .rows import Rows
from .stage import Rectangle, Stage
from .window_layout import WindowLayout


__all__ = ["RankLayout", "RankPlan", "Rectangle", "Rows", "Stage", "WindowLayout"]
