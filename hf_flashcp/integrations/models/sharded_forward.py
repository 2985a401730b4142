"""Whether this thread is inside the forward of a model whose batch has been sharded.

Mask functions have no other way to know. Attention layers get the plan itself, as a keyword argument, which also
reaches the recomputation of a checkpointed layer, on whatever thread that runs.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ...layout import RankPlan


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(eq=False)
class ShardedForward:
    """One forward of an attached model, and what its layers and masks have asked for."""

    model: torch.nn.Module
    plan: RankPlan
    is_first: bool  # asks for checks that cost something
    router_group: ProcessGroup | None = None  # ranks whose tokens a router loss is about
    router_weight: float = 1.0  # the share of it that this rank's loss has
    attention_modules: set[int] = field(default_factory=set)  # ids of those that called us with the plan
    attention_windows: set[int | None] = field(default_factory=set)  # `None` for full attention
    mask_windows: set[int] = field(default_factory=set)
    has_other_mask: bool = False  # neither causal nor a sliding window
    router_loss: torch.Tensor | None = None  # the whole of it, if the model computed one


_current: ContextVar[ShardedForward | None] = ContextVar("flashcp_sharded_forward", default=None)
_forwards = 0
is_running = False
"""Whether any thread is inside a sharded forward, for code that torch.compile traces."""


def sharded_forward_count() -> int:
    """How many sharded forwards this process has begun."""
    return _forwards


def current_sharded_forward() -> ShardedForward | None:
    return _current.get()


def set_sharded_forward(forward: ShardedForward | None) -> None:
    """Enters a sharded forward, or leaves it."""
    global _forwards, is_running
    is_running = forward is not None
    _forwards += is_running
    _current.set(forward)
