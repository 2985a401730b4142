"""Whether this thread is inside the forward of a model whose batch has been sharded.

Mask functions have no other way to know. Attention layers get the plan itself, as a keyword argument, which also
reaches the recomputation of a checkpointed layer, on whatever thread that runs.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch

from ..layout import RankPlan


class ShardedForward:
    """One forward of an attached model: its plan, the attention modules that called us with it, the sliding windows
    that they asked for (`None` among them for full attention), and those that the model's masks asked for;
    `has_other_mask` if a mask was neither causal nor a sliding window. `is_first` asks for checks that cost
    something."""

    def __init__(self, model: torch.nn.Module, plan: RankPlan, is_first: bool):
        self.model = model
        self.plan = plan
        self.is_first = is_first
        self.attention_modules: set[int] = set()
        self.attention_windows: set[int | None] = set()
        self.mask_windows: set[int] = set()
        self.has_other_mask = False


_current: ContextVar[ShardedForward | None] = ContextVar("flashcp_sharded_forward", default=None)


_forwards = 0
is_running = False
"""Whether any thread is inside a sharded forward, for code that torch.compile traces."""


def sharded_forward_count() -> int:
    """How many sharded forwards this process has begun."""
    return _forwards


def current_sharded_forward() -> ShardedForward | None:
    return _current.get()


def enter_sharded_forward(model: torch.nn.Module, plan: RankPlan, is_first: bool) -> None:
    global _forwards, is_running
    _forwards += 1
    is_running = True
    _current.set(ShardedForward(model, plan, is_first))


def leave_sharded_forward() -> None:
    global is_running
    is_running = False
    _current.set(None)
