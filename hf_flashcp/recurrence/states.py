"""`exchange_states` and `carry_states`: the states with which a rank's slices begin, differentiable by autograd.

Over slice j of a document a linear recurrence maps the state with which the slice begins to that with which it ends,
S <- A_j S + B_j. A rank runs all of its slices from zero states, which yields each slice's (A_j, B_j). These go to
every rank that holds a later slice, which then follows the chain S_1 = B_0, S_{j+1} = A_j S_j + B_j. For gradients,
where D_j is that of the state S_j from the outputs of slice j:

    G_j = D_{j+1} + A_{j+1}^T G_{j+1}        gradient of the state with which slice j ends
    dB_j = G_j,  dA_j = G_j S_j^T

so (A_j, D_j) go to every rank that holds an earlier slice, and the same code follows the chain backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from ..exchange import Transfer, send_rows
from ..layout import RankPlan
from ..layout.state_layout import StateExchange


if TYPE_CHECKING:
    from ..exchange.hierarchical import HierarchicalTransfer

STATES, GRADIENTS = "recurrent states", "gradients of recurrent states"


def exchange_states(decay: torch.Tensor, added: torch.Tensor, plan: RankPlan) -> list[Transfer | HierarchicalTransfer]:
    """Post the summaries (A, B) of this rank's slices that other ranks continue.

    Args:
        decay: A, (n, H, K, K), or (n, H, 1, 1) if A scales the state of a head. The n slices are the `first` ones
            followed by the `continued` ones of the plan's [`StateLayout`].
        added: B, (n, H, K, V), in the dtype of `decay`.
        plan: a plan that cuts documents. Every rank of its group calls this function.
    """
    return _post(decay, added, plan.states.forward, plan, STATES)


def carry_states(
    out: torch.Tensor,
    decay: torch.Tensor,
    added: torch.Tensor,
    plan: RankPlan,
    transfers: list[Transfer | HierarchicalTransfer],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `out` unchanged, and the states (n, H, K, V) with which this rank's slices of cut documents begin.

    Every rank calls it, and its backward, even one without such slices. Because `out` passes through, backward arrives
    here on every rank.

    Args:
        out: output of the layer, of any shape.
        decay, added: (A, B), as in [`exchange_states`].
        plan: a plan that cuts documents.
        transfers: what `exchange_states` returned.
    """
    return _CarryStates.apply(out, decay, added, plan, transfers)


def in_full_precision(function: Callable, *inputs: Any) -> Any:
    """Call a function without autocast, which would run its products in bf16.

    The first input is a tensor.
    """
    with torch.autocast(inputs[0].device.type, enabled=False):
        return function(*inputs)


class _CarryStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, decay, added, plan, transfers):
        states = in_full_precision(_follow, decay, added, plan.states.forward, transfers)
        ctx.save_for_backward(decay, states)
        ctx.plan = plan
        return out.view_as(out), states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_states):
        decay, states = ctx.saved_tensors
        exchange, backwards = ctx.plan.states.backward, decay.transpose(-1, -2)
        transfers = _post(backwards, grad_states, exchange, ctx.plan, GRADIENTS)
        grad_added = in_full_precision(_follow, backwards, grad_states, exchange, transfers)
        grad_decay = in_full_precision(_grad_decay, grad_added, states, _scales(decay))
        return grad_out, grad_decay, grad_added, None, None


def _scales(decay: torch.Tensor) -> bool:
    return decay.shape[-2:] == (1, 1)


def _post(
    decay: torch.Tensor, added: torch.Tensor, exchange: StateExchange, plan: RankPlan, what: str
) -> list[Transfer | HierarchicalTransfer]:
    """Post the rows [A | B] of the rank's slices, in at most one transfer."""
    order, _ = exchange.on(added.device)
    rows = torch.cat([decay.detach().flatten(1), added.detach().flatten(1)], dim=1)[order]
    sent = exchange.rows.send_rows(added.device).take(rows).contiguous()
    return [
        send_rows(sent, rows.new_empty(stage.received, rows.shape[1]), stage, plan.group, what)
        for stage in exchange.rows.stages(added.device)
    ]


def _follow(
    decay: torch.Tensor,
    added: torch.Tensor,
    exchange: StateExchange,
    transfers: list[Transfer | HierarchicalTransfer],
) -> torch.Tensor:
    """Await the summaries of other ranks, and return the state (n, H, K, V) that each of the rank's slices meets."""
    order, chains = exchange.on(added.device)
    received = [transfer.wait() for transfer in transfers]
    split = [decay.shape[1:].numel(), added.shape[1:].numel()]
    parts = [(decay[order], added[order])]
    for rows in received:
        decays, terms = rows.split(split, dim=1)
        parts.append((decays.view(-1, *decay.shape[1:]), terms.view(-1, *added.shape[1:])))
    decays, terms = (torch.cat(each)[chains.sources] for each in zip(*parts))
    met, done, state = torch.zeros_like(added), 0, None
    for step in chains.steps:
        now = slice(done, done + step.chains)
        state = terms[now] if state is None else _times(decays[now], state[: step.chains]) + terms[now]
        met[step.reached] = state[step.reaching]
        done += step.chains
    return met


def _times(decay: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return decay * state if _scales(decay) else decay @ state


def _grad_decay(grad_states: torch.Tensor, states: torch.Tensor, scales: bool) -> torch.Tensor:
    """Return the gradient of A, where the states after and before a slice have these gradients and values."""
    return (grad_states * states).sum((-1, -2), keepdim=True) if scales else grad_states @ states.transpose(-1, -2)
