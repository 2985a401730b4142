"""`document_attention`: the attention of one layer on one rank, as a function that autograd knows.

Saved for backward, in bytes per token of the rank, with e the size of an element and E that of the accumulate dtype
(4, or 8 in fp64): query, key, value and output, e * (H_q * (D_k + D_v) + H_kv * (D_k + D_v)), and the logsumexp,
E * H_q.
Received KV, where it is kept, takes e * H_kv * (D_k + D_v) per token received, and in layers with a sliding window as
much for each of the rank's own tokens that lie in the bands of keys. Nothing grows with the square of the tokens.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..layout import RankPlan
from .engine import Engine
from .kernels import AttentionKernel, BackwardInputs, select_kernel
from .operator import run_forward
from .reference_check import CheckedEngine


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: RankPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    keep_received_kv: bool | None = None,
    kernel: AttentionKernel | None = None,
    check_as: str | None = None,
) -> torch.Tensor:
    """Causal attention inside each document for this rank's tokens, with KV fetched from the ranks that hold it.

    Every rank of the plan's group calls it, in forward and in backward.

    Args:
        query, key, value: (H_q, T_r, D_k), (H_kv, T_r, D_k) and (H_kv, T_r, D_v); H_q is a multiple of H_kv.
        scale: factor of the scores, defaults to D_k ** -0.5.
        window: keys that a query sees, itself included; all before it if `None`.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: (H_q,) a score per head that takes its share of every softmax and has no value. Its gradient is that of
            this rank's tokens alone.
        keep_received_kv: the same on every rank; defaults to the plan's, see [`RankPlan`].
        kernel: defaults to the best for the device and the layer.
        check_as: the layer's name, on every rank or none: its results are compared with those of the formulas in
            float64, see [`CheckedEngine`].

    Returns (H_q, T_r, D_v), as if every document had been attended to alone on one device.
    """
    dims = {"key_dim": query.shape[-1], "value_dim": value.shape[-1]}
    engine = Engine(
        plan.group,
        plan.layout_for(window),
        kernel or select_kernel(query.device, softcap, dtype=query.dtype, **dims),
        query.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
        plan.keep_received_kv if keep_received_kv is None else keep_received_kv,
    )
    if check_as is not None:
        engine = CheckedEngine(engine, plan, check_as, sinks)
    return _DocumentAttention.apply(query, key, value, sinks, engine)


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, engine):
        out, lse, received = run_forward(engine, query, key, value, sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse, *received)
        ctx.engine = engine
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, sinks, out, lse, *received = ctx.saved_tensors
        _, key_needs, value_needs, sinks_need, _ = ctx.needs_input_grad
        inputs = BackwardInputs(grad_out, query, key, value, out, lse)
        # Whether keys need one is the same on every rank: it follows from which parameters the model trains.
        grads = ctx.engine.backward(inputs, received, key_needs or value_needs)
        return (
            grads.query.to(query.dtype),
            grads.key.to(query.dtype) if key_needs else None,
            grads.value.to(query.dtype) if value_needs else None,
            _grad_sinks(inputs, sinks) if sinks_need else None,
            None,
        )


def _grad_sinks(inputs: BackwardInputs, sinks: torch.Tensor) -> torch.Tensor:
    """(H_q,): a sink takes the share exp(sink - lse) of a row and gives nothing for it."""
    dtype = inputs.lse.dtype
    share = (sinks.to(dtype).unsqueeze(-1) - inputs.lse).exp()
    return -(share * (inputs.grad_out.to(dtype) * inputs.out.to(dtype)).sum(-1)).sum(-1).to(sinks.dtype)
