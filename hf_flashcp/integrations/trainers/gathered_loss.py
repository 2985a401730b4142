"""`GatheredLoss`: a `compute_loss_func` that gathers what it needs from the ranks that share a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ...errors import ConfigurationError
from ...layout import RankPlan


PARAMETER = "flashcp_plan"


def gathers(function: Callable[..., Any] | None) -> bool:
    """Return whether a `compute_loss_func` has a parameter for the plan, with which it can gather tokens."""
    if isinstance(function, GatheredLoss):
        return True
    return callable(function) and PARAMETER in inspect.signature(function).parameters


class GatheredLoss:
    """Calls a `compute_loss_func` with the plan of the batch, and scales its loss as Trainer expects.

    The function returns the same loss on every rank of the group, computed from gathered values, whose gradients all
    ranks add up. Trainer goes on as if ranks had computed parts of it.

    Args:
        function: called as `function(outputs, labels, num_items_in_batch=..., flashcp_plan=...)`. `outputs` are those
            of this rank's tokens, and `labels` (1, T_r) are their targets: shifted, and -100 where there is none.
        cp_size (`int`): number of ranks that share a batch.
    """

    def __init__(self, function: Callable[..., torch.Tensor], cp_size: int):
        self._function, self._cp_size = function, cp_size
        self._plan: RankPlan | None = None

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keep the plan of a sharded batch for the next call, and return the batch with targets as labels."""
        plan = inputs.get(PARAMETER)
        self._plan = plan if isinstance(plan, RankPlan) else None
        return inputs if self._plan is None else {**inputs, "labels": inputs["shift_labels"]}

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        if self._plan is None:
            raise ConfigurationError(
                f"compute_loss_func has a parameter {PARAMETER}, but the batch was not sharded: it is padded, and "
                "cp_size is 1. Use FlashCPCollator, or leave the parameter out."
            )
        options = {"num_items_in_batch": num_items_in_batch, PARAMETER: self._plan}
        return self._function(outputs, labels, **options) / self._cp_size
