"""The cross-entropy of an output head, chunk by chunk of tokens, so that logits of all tokens never exist.

The gradients of each chunk are computed in forward, while its logits exist, so nothing is computed again in backward.
Those of the head's weights are added up in at least fp32. (`torch.nn.functional.linear_cross_entropy` adds them up in
the weights' dtype and returns the loss in it, which in bf16 is less exact than a loss from whole logits.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ...data.boundaries import IGNORE_INDEX
from ...layout import accumulate_dtype


Head = Callable[[torch.Tensor], torch.Tensor]
"""Returns the logits (1, n, V) of hidden states (1, n, H)."""


def summed_loss(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, weights: Sequence[torch.Tensor], chunk: int
) -> torch.Tensor:
    """Return the cross-entropy summed over all targets, in nats, differentiable.

    Args:
        head: computes logits token by token.
        hidden: (1, T, H) hidden states.
        targets: (1, T) token ids, with -100 where there is no target.
        weights: all tensors of the head that need a gradient, see [`leaves`].
        chunk: tokens whose logits exist at a time.

    Returns a scalar in the dtype of the logits, but at least fp32.
    """
    return _SummedLoss.apply(head, targets, chunk, hidden, *weights)


@torch.no_grad()
def losses_of_tokens(head: Head, hidden: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the cross-entropy (T,) of each token, 0 where there is no target. Arguments as in [`summed_loss`]."""
    parts = [_cross_entropy(head(part), of_part, "none") for part, of_part in _chunks(hidden, targets, chunk)]
    return torch.cat(parts)


def leaves(output: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that get a gradient from the backward of `output`, for example parameters."""
    found, seen, waiting = [], set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, targets, chunk, hidden, *weights):
        hidden_needs = ctx.needs_input_grad[3]
        of_hidden = torch.empty_like(hidden) if hidden_needs else None
        sums = [torch.zeros_like(weight, dtype=accumulate_dtype(weight.dtype)) for weight in weights]
        losses, start = [], 0
        for part, of_part in _chunks(hidden, targets, chunk):
            with torch.enable_grad():
                part = part.detach().requires_grad_(hidden_needs)
                loss = _cross_entropy(head(part), of_part, "sum")
            losses.append(loss.detach())
            gradients = torch.autograd.grad(loss, [part] * hidden_needs + [*weights])
            if of_hidden is not None:
                of_hidden[:, start : start + part.shape[1]], *gradients = gradients
            add_gradients(sums, gradients)
            start += part.shape[1]
            del loss, gradients  # before the next chunk's logits are allocated
        ctx.save_for_backward(of_hidden, *sums)
        ctx.dtypes = [weight.dtype for weight in weights]
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        of_hidden, *sums = ctx.saved_tensors
        of_weights = (
            torch.mul(total, grad_loss, out=torch.empty_like(total, dtype=dtype))  # rounded once
            for total, dtype in zip(sums, ctx.dtypes)
        )
        return (
            None,
            None,
            None,
            None if of_hidden is None else of_hidden * grad_loss,
            *of_weights,
        )


def add_gradients(sums: list[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]) -> None:
    """Add gradients to their sums, in at least fp32. A sum is `None` as long as there is no gradient."""
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        total = sums[index]
        if total is None:
            sums[index] = gradient.to(accumulate_dtype(gradient.dtype), copy=True)
        else:
            total += gradient


def _chunks(hidden: torch.Tensor, targets: torch.Tensor, chunk: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(hidden.split(chunk, dim=1), targets.split(chunk, dim=1))


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    logits = logits.to(accumulate_dtype(logits.dtype)).flatten(0, 1)
    targets = targets.flatten().to(logits.device)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction=reduction)
