"""The attention of one layer on one rank, forward and backward, with its exchange.

Forward: post the KV that others need, run the local pass, wait, run the passes over what arrived, merge.
Backward: the same rectangles with the merged output and logsumexp, remote ones first; their dK and dV travel home
while the local pass runs, and are added in rank order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..exchange import kv_rows, send_grads_home, send_kv
from ..layout import RankLayout, RankPlan, Stage
from .kernels import AttentionKernel, accumulate_dtype, select_kernel


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
    kernel: AttentionKernel | None = None,
) -> torch.Tensor:
    """Causal attention inside each document for this rank's tokens, with KV fetched from the ranks that hold it.

    Every rank of the plan's group calls it, in forward and in backward.

    Args:
        query (`torch.Tensor`): (H_q, T_r, D_k).
        key (`torch.Tensor`): (H_kv, T_r, D_k); H_q is a multiple of H_kv.
        value (`torch.Tensor`): (H_kv, T_r, D_v).
        plan (`RankPlan`): the plan bound to this rank.
        scale (`float`, *optional*): of the scores, defaults to D_k ** -0.5.
        window (`int`, *optional*): keys that a query sees, itself included; all before it if `None`.
        softcap (`float`, *optional*): scores become softcap * tanh(scores / softcap).
        sinks (`torch.Tensor`, *optional*): (H_q,) a score per head that takes its share of every softmax and has no
            value. Its gradient is that of this rank's tokens alone.
        kernel (`AttentionKernel`, *optional*): defaults to the best for the device and the options.

    Returns:
        `torch.Tensor`: (H_q, T_r, D_v), as if every document had been attended to alone on one device.
    """
    run = _Run(
        plan,
        plan.layout_for(window),
        kernel or select_kernel(query.device, softcap),
        query.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
    )
    return _DocumentAttention.apply(query, key, value, sinks, run)


class _Run(NamedTuple):
    """What a layer's forward and backward share beside tensors."""

    plan: RankPlan
    layout: RankLayout
    kernel: AttentionKernel
    scale: float
    softcap: float | None

    def stage_options(self, causal: bool) -> dict[str, Any]:
        window = self.layout.window if causal else None
        return {"causal": causal, "scale": self.scale, "window": window, "softcap": self.softcap}


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, run):
        group, stages = run.plan.group, run.layout.stages(query.device)
        transfers = [send_kv(key, value, stage, group) for stage in stages]
        out, lse = _local_forward(query, key, value, run)
        received = []
        if len(stages) > 1 or sinks is not None:
            out = out.to(accumulate_dtype(out.dtype))
        for stage, transfer in zip(stages, transfers):
            kv = _ordered_keys(transfer.wait(), key, value, stage)
            received.append(kv)
            if stage.rectangles:
                remote = run.kernel.forward(
                    query, *_split(kv, key), stage.rectangles, **run.stage_options(stage.causal)
                )
                out, lse = _merge(out, lse, *remote, stage.rows)
        if sinks is not None:
            without = lse
            lse = torch.logaddexp(without, sinks.to(lse.dtype).unsqueeze(-1))
            out = out * (without - lse).exp().unsqueeze(-1)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, lse, *received)
        ctx.run = run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, sinks, out, lse, *received = ctx.saved_tensors
        run = ctx.run
        stages = run.layout.stages(query.device)
        dtype = accumulate_dtype(query.dtype)
        grad_query, grad_key, grad_value = (torch.zeros_like(tensor, dtype=dtype) for tensor in (query, key, value))
        # The same on every rank: it follows from which parameters the model trains.
        keys_need_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        transfers = []
        for stage, kv in zip(stages, received):
            grad_kv = torch.zeros_like(kv, dtype=dtype)
            if stage.rectangles:
                remote_grad_key, remote_grad_value = _split(grad_kv, key)
                run.kernel.backward(
                    grad_out,
                    query,
                    *_split(kv, key),
                    out,
                    lse,
                    stage.rectangles,
                    **run.stage_options(stage.causal),
                    grad_query=grad_query,
                    grad_key=remote_grad_key,
                    grad_value=remote_grad_value,
                )
            if keys_need_grad:
                grad_received, grad_local = _received_and_local(grad_kv, stage)
                transfers.append(send_grads_home(grad_received.to(key.dtype), stage, run.plan.group))
                if grad_local is not None:
                    _add_rows(grad_key, grad_value, stage.local_rows, grad_local)
        if run.layout.local:
            run.kernel.backward(
                grad_out,
                query,
                key,
                value,
                out,
                lse,
                run.layout.local,
                **run.stage_options(causal=True),
                grad_query=grad_query,
                grad_key=grad_key,
                grad_value=grad_value,
            )
        for stage, transfer in zip(stages, transfers):
            # One rank after the other: a token may go to several, but to each only once, so the order of the sum is
            # fixed on every device.
            pieces = transfer.wait().split(stage.send_splits)
            for rows, piece in zip(stage.send_rows.split(stage.send_splits), pieces):
                _add_rows(grad_key, grad_value, rows, piece.to(dtype))
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            share = (sinks.to(dtype).unsqueeze(-1) - lse).exp()
            grad_sinks = -(share * (grad_out.to(dtype) * out.to(dtype)).sum(-1)).sum(-1).to(sinks.dtype)
        return (
            grad_query.to(query.dtype),
            grad_key.to(key.dtype) if ctx.needs_input_grad[1] else None,
            grad_value.to(value.dtype) if ctx.needs_input_grad[2] else None,
            grad_sinks,
            None,
        )


def _local_forward(query, key, value, run: _Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp of the local rectangles; rows outside them have no keys yet, so logsumexp -inf."""
    layout = run.layout
    rows = layout.local_rows(query.device)
    if rows is None:
        return run.kernel.forward(query, key, value, layout.local, **run.stage_options(causal=True))
    out = query.new_zeros(*query.shape[:2], value.shape[-1])
    lse = torch.full(query.shape[:2], -torch.inf, dtype=accumulate_dtype(query.dtype), device=query.device)
    if layout.local:
        local = run.kernel.forward(query, key, value, layout.local, **run.stage_options(causal=True))
        out.index_copy_(1, rows, local[0])
        lse.index_copy_(1, rows, local[1])
    return out, lse


def _split(kv: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, H_kv, D_k + D_v) rows as views (H_kv, n, D_k) and (H_kv, n, D_v)."""
    heads_first = kv.transpose(0, 1)
    return heads_first[..., : key.shape[-1]], heads_first[..., key.shape[-1] :]


def _ordered_keys(received: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stage: Stage) -> torch.Tensor:
    """(n_keys, H_kv, D_k + D_v): what the stage's rectangles attend to."""
    if stage.local_rows is not None:
        received = torch.cat((received, kv_rows(key, value, stage.local_rows)))
    return received if stage.key_order is None else received.index_select(0, stage.key_order)


def _received_and_local(grad_kv: torch.Tensor, stage: Stage) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The transpose of `_ordered_keys`: gradients of the received rows, in the order received, and of the local."""
    received = sum(stage.recv_splits)
    local = 0 if stage.local_rows is None else len(stage.local_rows)
    if stage.key_order is not None:
        rows = grad_kv.new_zeros(received + local, *grad_kv.shape[1:])
        grad_kv = rows.index_add_(0, stage.key_order, grad_kv)
    return grad_kv[:received], grad_kv[received:] if local else None


def _add_rows(grad_key: torch.Tensor, grad_value: torch.Tensor, rows: torch.Tensor, grad_kv: torch.Tensor) -> None:
    from_key, from_value = _split(grad_kv, grad_key)
    grad_key.index_add_(1, rows, from_key)
    grad_value.index_add_(1, rows, from_value)


def _merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    remote_out: torch.Tensor,
    remote_lse: torch.Tensor,
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys from the attention over each, by their logsumexp (FlashAttention's
    combine step). `rows` are the rows of `out` that the remote part covers, all of them if `None`. Every remote row
    has keys, so its logsumexp is finite; where the other one is -inf the remote part is the result."""
    part_out, part_lse = (out, lse) if rows is None else (out.index_select(1, rows), lse.index_select(1, rows))
    dtype = accumulate_dtype(out.dtype)
    weight = torch.sigmoid(remote_lse - part_lse).unsqueeze(-1)
    merged = torch.lerp(part_out.to(dtype), remote_out.to(dtype), weight).to(out.dtype)
    merged_lse = torch.logaddexp(part_lse, remote_lse)
    if rows is None:
        return merged, merged_lse
    return out.index_copy_(1, rows, merged), lse.index_copy_(1, rows, merged_lse)
