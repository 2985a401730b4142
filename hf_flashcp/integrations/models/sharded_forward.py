"""The state of a sharded forward, which tells whether the current thread is inside one.

Mask functions have no other way to find out. Attention layers get the plan as a keyword argument, which also reaches
the recomputation of a checkpointed layer on any thread.
"""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ...layout import RankPlan


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(eq=False)
class ShardedForward:
    """One forward of an attached model, and the windows and masks that its layers have asked for."""

    model: torch.nn.Module
    plan: RankPlan
    is_first: bool  # turns on checks that take time
    router_group: ProcessGroup | None = None  # ranks over whose tokens a router loss is computed
    router_weight: float = 1.0  # factor of the router loss in this rank's loss
    kernels: dict[int, str] = field(default_factory=dict)  # kernel of each module that used the plan, by its id
    mixer_calls: Counter[str] = field(default_factory=Counter)  # calls of recurrent layers' functions with the plan
    attention_windows: set[int | None] = field(default_factory=set)  # `None` for full attention
    mask_windows: set[int] = field(default_factory=set)
    has_other_mask: bool = False  # whether a mask was neither causal nor a sliding window
    router_loss: torch.Tensor | None = None  # loss over all ranks, if the model computed one


_current: ContextVar[ShardedForward | None] = ContextVar("flashcp_sharded_forward", default=None)
_forwards = 0
is_running = False
"""Whether any thread is inside a sharded forward, for code that torch.compile traces."""


def sharded_forward_count() -> int:
    """Return how many sharded forwards this process has started."""
    return _forwards


def current_sharded_forward() -> ShardedForward | None:
    """Return the sharded forward that this thread is in, if any."""
    return _current.get()


def is_inside() -> bool:
    """Return whether this thread is inside a sharded forward; while torch.compile traces, whether any thread is."""
    if torch.compiler.is_compiling():  # dynamo cannot trace a ContextVar
        return is_running
    return current_sharded_forward() is not None


def set_sharded_forward(forward: ShardedForward | None) -> None:
    """Enter a sharded forward, or leave it with `None`."""
    global _forwards, is_running
    is_running = forward is not None
    _forwards += is_running
    _current.set(forward)
