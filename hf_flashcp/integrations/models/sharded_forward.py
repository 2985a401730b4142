"""Whether this thread is inside the forward of a model whose batch has been sharded.

Mask functions have no other way to know. Attention layers get the plan itself, as a keyword argument, which also
reaches the recomputation of a checkpointed layer, on whatever thread that runs.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

from ...layout import RankPlan


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ShardedForward:
    """One forward of an attached model.

    Args:
        model (`torch.nn.Module`): the transformers model.
        plan (`RankPlan`): of its batch.
        is_first (`bool`): asks for checks that cost something.
        router_group (`ProcessGroup`, *optional*): ranks whose tokens a router loss is about.
        router_weight (`float`): the share of it that this rank's loss has.

    Attributes:
        attention_modules (`set[int]`): ids of those that called us with the plan.
        attention_windows (`set[int | None]`): the sliding windows that they asked for, `None` for full attention.
        mask_windows (`set[int]`): those that the model's masks asked for.
        has_other_mask (`bool`): whether a mask was neither causal nor a sliding window.
        router_loss (`torch.Tensor`, *optional*): the whole of it, if the model computed one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: RankPlan,
        is_first: bool,
        router_group: ProcessGroup | None = None,
        router_weight: float = 1.0,
    ):
        self.model = model
        self.plan = plan
        self.is_first = is_first
        self.router_group = router_group
        self.router_weight = router_weight
        self.attention_modules: set[int] = set()
        self.attention_windows: set[int | None] = set()
        self.mask_windows: set[int] = set()
        self.has_other_mask = False
        self.router_loss: torch.Tensor | None = None


_current: ContextVar[ShardedForward | None] = ContextVar("flashcp_sharded_forward", default=None)


_forwards = 0
is_running = False
"""Whether any thread is inside a sharded forward, for code that torch.compile traces."""


def sharded_forward_count() -> int:
    """How many sharded forwards this process has begun."""
    return _forwards


def current_sharded_forward() -> ShardedForward | None:
    return _current.get()


def enter_sharded_forward(forward: ShardedForward) -> None:
    global _forwards, is_running
    _forwards += 1
    is_running = True
    _current.set(forward)


def leave_sharded_forward() -> None:
    global is_running
    is_running = False
    _current.set(None)
