"""The attention of one layer on one rank, forward and backward, with its exchange.

Forward: post the KV that others need, run the local causal pass, wait, run the full passes over what arrived, merge.
Backward: the same rectangles with the merged output and logsumexp, remote ones first; their dK and dV travel home
while the local pass runs, and are added in rank order.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..exchange import send_grads_home, send_kv
from ..layout import RankPlan, Stage
from .kernels import AttentionKernel, accumulate_dtype, select_kernel


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: RankPlan,
    *,
    scale: float | None = None,
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
        kernel (`AttentionKernel`, *optional*): defaults to the best for the device.

    Returns:
        `torch.Tensor`: (H_q, T_r, D_v), as if every document had been attended to alone on one device.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return _DocumentAttention.apply(query, key, value, plan, scale, kernel or select_kernel(query.device))


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan, scale, kernel):
        layout, stages = plan.layout, plan.layout.stages(query.device)
        transfers = [send_kv(key, value, stage, plan.group) for stage in stages]
        out, lse = kernel.forward(query, key, value, layout.local, causal=True, scale=scale)
        received = []
        if len(stages) > 1:
            out = out.to(accumulate_dtype(out.dtype))
        for stage, transfer in zip(stages, transfers):
            kv = _in_document_order(transfer.wait(), stage)
            received.append(kv)
            if stage.rectangles:
                remote = kernel.forward(query, *_split(kv, key), stage.rectangles, causal=False, scale=scale)
                out, lse = _merge(out, lse, *remote, stage.rows)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *received)
        ctx.plan, ctx.scale, ctx.kernel = plan, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, lse, *received = ctx.saved_tensors
        plan, stages = ctx.plan, ctx.plan.layout.stages(query.device)
        dtype = accumulate_dtype(query.dtype)
        grad_query, grad_key, grad_value = (torch.zeros_like(tensor, dtype=dtype) for tensor in (query, key, value))
        # The same on every rank: it follows from which parameters the model trains.
        keys_need_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        transfers = []
        for stage, kv in zip(stages, received):
            grad_kv = torch.zeros_like(kv, dtype=dtype)
            if stage.rectangles:
                remote_grad_key, remote_grad_value = _split(grad_kv, key)
                ctx.kernel.backward(
                    grad_out,
                    query,
                    *_split(kv, key),
                    out,
                    lse,
                    stage.rectangles,
                    causal=False,
                    scale=ctx.scale,
                    grad_query=grad_query,
                    grad_key=remote_grad_key,
                    grad_value=remote_grad_value,
                )
            if keys_need_grad:
                grad_kv = _in_received_order(grad_kv.to(key.dtype), stage)
                transfers.append(send_grads_home(grad_kv, stage, plan.group))
        ctx.kernel.backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            plan.layout.local,
            causal=True,
            scale=ctx.scale,
            grad_query=grad_query,
            grad_key=grad_key,
            grad_value=grad_value,
        )
        for stage, transfer in zip(stages, transfers):
            # One rank after the other: a token may go to several, but to each only once, so the order of the sum is
            # fixed on every device.
            pieces = transfer.wait().split(stage.send_splits)
            for rows, piece in zip(stage.send_rows.split(stage.send_splits), pieces):
                from_key, from_value = _split(piece.to(dtype), key)
                grad_key.index_add_(1, rows, from_key)
                grad_value.index_add_(1, rows, from_value)
        return (
            grad_query.to(query.dtype),
            grad_key.to(key.dtype) if ctx.needs_input_grad[1] else None,
            grad_value.to(value.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )


def _split(kv: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, H_kv, D_k + D_v) rows as views (H_kv, n, D_k) and (H_kv, n, D_v)."""
    heads_first = kv.transpose(0, 1)
    return heads_first[..., : key.shape[-1]], heads_first[..., key.shape[-1] :]


def _in_document_order(received: torch.Tensor, stage: Stage) -> torch.Tensor:
    return received if stage.recv_order is None else received.index_select(0, stage.recv_order)


def _in_received_order(ordered: torch.Tensor, stage: Stage) -> torch.Tensor:
    return ordered if stage.recv_order is None else torch.empty_like(ordered).index_copy_(0, stage.recv_order, ordered)


def _merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    remote_out: torch.Tensor,
    remote_lse: torch.Tensor,
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys from the attention over each, by their logsumexp (FlashAttention's
    combine step). `rows` are the rows of `out` that the remote part covers, all of them if `None`. Every row here has
    keys on both sides, so both logsumexp are finite."""
    part_out, part_lse = (out, lse) if rows is None else (out.index_select(1, rows), lse.index_select(1, rows))
    dtype = accumulate_dtype(out.dtype)
    weight = torch.sigmoid(remote_lse - part_lse).unsqueeze(-1)
    merged = torch.lerp(part_out.to(dtype), remote_out.to(dtype), weight).to(out.dtype)
    merged_lse = torch.logaddexp(part_lse, remote_lse)
    if rows is None:
        return merged, merged_lse
    return out.index_copy_(1, rows, merged), lse.index_copy_(1, rows, merged_lse)
