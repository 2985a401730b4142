"""`gather_tokens`: brings the per-token values of all ranks together, with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from ..distributed import add_over_ranks
from ..errors import BatchError, ConfigurationError
from ..layout import RankPlan
from ..layout.upload import upload


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_WHAT = "values of other ranks' tokens"


def gather_tokens(values: torch.Tensor, plan: RankPlan) -> torch.Tensor:
    """Return the values of all tokens of a packed row, in the row's order, on every rank.

    Every rank of the plan's group must call it, and must use the result in the same way: the gradient that a rank's
    values get is the sum of the gradients that all ranks computed for them. So each rank sees ordinary data
    parallelism, in which DDP and FSDP2 average gradients: if all ranks compute the same loss from the result, the
    averaged gradient is that of this loss.

    Args:
        values (`torch.Tensor`): (1, T_r, ...), one value per token of this rank, of any dtype. For example, the
            `logits` of a sharded forward, or better something smaller that was computed from them.
        plan (`RankPlan`): the plan of the forward: `handle.plan` of [`attach`], `trainer.flashcp.plan`, or the
            `flashcp_plan` of a batch from [`shard_inputs`].

    Returns (C, ...): the values of the packed row's C tokens, the same on every rank. An all-reduce brings them
    together, and another one their gradients, so a row of C values takes memory on every rank.

    Raises:
        ConfigurationError: `plan` is not bound to a rank.
        BatchError: `values` do not have one row with one value per token of this rank.
    """
    if not isinstance(plan, RankPlan):
        raise ConfigurationError(
            f"gather_tokens needs the RankPlan of a sharded forward, but plan is a {type(plan).__name__}. Pass "
            "handle.plan, trainer.flashcp.plan or the flashcp_plan of a sharded batch."
        )
    tokens = plan.layout.num_tokens
    if values.shape[:2] != (1, tokens):
        raise BatchError(
            f"The values have shape {tuple(values.shape)}, but this rank has {tokens} tokens of the batch: pass "
            f"values of shape (1, {tokens}, ...)."
        )
    index = upload(plan.layout.token_index, values.device)
    if values.dtype == torch.bool:
        return gather_tokens(values.to(torch.uint8), plan).bool()
    return _GatherTokens.apply(values, index, plan.plan.num_tokens, plan.group)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, index: torch.Tensor, num_tokens: int, group: ProcessGroup | None):
        ctx.save_for_backward(index)
        ctx.group = group
        row = values.new_zeros((num_tokens, *values.shape[2:]))
        return add_over_ranks(row.index_copy_(0, index, values[0]), group, _WHAT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor):
        (index,) = ctx.saved_tensors
        summed = gradient.clone(memory_format=torch.contiguous_format)
        summed = add_over_ranks(summed, ctx.group, "gradients of this rank's tokens")
        return summed.index_select(0, index)[None], None, None, None
