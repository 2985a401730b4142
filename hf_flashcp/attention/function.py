"""`document_attention`: the attention of one layer on one rank, differentiable by autograd.

Memory saved for backward, where e is the size of an element and E that of an element of the accumulate dtype (4 bytes,
or 8 in fp64):

- query, key, value and output: e * (H_q + H_kv) * (D_k + D_v) bytes per token of the rank;
- logsumexp: E * H_q bytes per token of the rank;
- received KV, if it is kept: e * H_kv * (D_k + D_v) bytes per received token. Layers with a sliding window also keep
  this much for each of the rank's own tokens that they attend to together with received tokens.

Nothing grows with the square of the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..layout import RankPlan
from .engine import Engine
from .head_groups import GroupedEngine, HeadGroup, divide_heads
from .kernels import AttentionKernel, BackwardInputs, Layer, select_kernel
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
    head_groups: int | None = None,
    kernel: AttentionKernel | None = None,
    check_as: str | None = None,
) -> torch.Tensor:
    """Compute causal attention inside each document for this rank's tokens, fetching KV from the ranks that hold it.

    Every rank of the plan's group must call it and run its backward.

    Args:
        query, key, value: (H_q, T_r, D_k), (H_kv, T_r, D_k) and (H_kv, T_r, D_v); H_q is a multiple of H_kv.
        scale: factor applied to the scores; defaults to D_k ** -0.5.
        window: number of keys that a query sees, including its own; `None` for all earlier keys of the document.
        softcap: if given, scores become softcap * tanh(scores / softcap).
        sinks: (H_q,) one additional score per head in every softmax, without a value. Its gradient covers this rank's
            tokens only.
        keep_received_kv: whether to keep received KV for backward; must be the same on every rank. Defaults to the
            plan's setting, see [`RankPlan`].
        head_groups: number of groups of KV heads that are computed one after another, at most one per KV head; must be
            the same on every rank. Defaults to the plan's setting.
        kernel: attention kernel; defaults to the best one for the device and the layer.
        check_as: name of the layer. If given, which all ranks must agree on, the results are compared with the
            formulas in float64, see [`CheckedEngine`].

    Returns (H_q, T_r, D_v), the same result as for each document alone on one device.
    """
    ungrouped = Engine(
        plan.group,
        plan.layout_for(window),
        kernel or kernel_for(query, value, window, softcap),
        query.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
        plan.keep_received_kv if keep_received_kv is None else keep_received_kv,
    )
    groups = divide_heads(len(query), len(key), plan.head_groups if head_groups is None else head_groups)
    engine: Any = ungrouped if len(groups) == 1 else GroupedEngine(ungrouped, groups)
    if check_as is not None:
        engine = CheckedEngine(engine, ungrouped.options(causal=True), plan, check_as, sinks)
    return _DocumentAttention.apply(query, key, value, sinks, engine, groups)


def kernel_for(
    query: torch.Tensor, value: torch.Tensor, window: int | None, softcap: float | None, name: str | None = None
) -> AttentionKernel:
    """Return the kernel for a layer with these tensors, see [`~kernels.select_kernel`]."""
    layer = Layer(query.dtype, query.shape[-1], value.shape[-1], window is not None, softcap is not None)
    return select_kernel(query.device, layer, name)


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, engine, groups):
        out, lse, received = run_forward(engine, query, key, value, sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse, *received)
        ctx.engine, ctx.groups = engine, groups
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, sinks, out, lse, *received = ctx.saved_tensors
        _, key_needs, value_needs, sinks_need, *_ = ctx.needs_input_grad
        inputs = BackwardInputs(grad_out, query, key, value, out, lse)
        # Whether keys need a gradient depends on which parameters are trained, so it is the same on every rank.
        grads = ctx.engine.backward(inputs, received, key_needs or value_needs)
        return (
            grads.query,
            grads.key if key_needs else None,
            grads.value if value_needs else None,
            _grad_sinks(inputs, sinks, ctx.groups) if sinks_need else None,
            None,
            None,
        )


def _grad_sinks(inputs: BackwardInputs, sinks: torch.Tensor, groups: Sequence[HeadGroup]) -> torch.Tensor:
    """Return the gradient (H_q,) of the sinks, whose share of a row's softmax is exp(sink - lse)."""
    return torch.cat([_grad_sinks_of(group.select(inputs), sinks[group.queries]) for group in groups])


def _grad_sinks_of(inputs: BackwardInputs, sinks: torch.Tensor) -> torch.Tensor:
    dtype = inputs.lse.dtype
    share = (sinks.to(dtype).unsqueeze(-1) - inputs.lse).exp()
    return -(share * (inputs.grad_out.to(dtype) * inputs.out.to(dtype)).sum(-1)).sum(-1).to(sinks.dtype)
