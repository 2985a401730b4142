"""`with_halo` and `without_halo`: rows of slices with the tokens before them, differentiable by autograd."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..exchange import return_grads, send_rows
from ..layout import RankPlan, Rows
from ..layout.halo_layout import HaloLayout


HALO, GRADIENTS = "tokens before slices", "gradients of tokens before slices"


def with_halo(rows: torch.Tensor, plan: RankPlan, width: int) -> torch.Tensor:
    """Return this rank's rows (T_r, D) with the `width` - 1 tokens before each slice: (T_p, D), see [`HaloLayout`].

    Every rank of the plan's group calls it, and its backward.
    """
    layout = plan.halo_for(width)
    if layout.num_padded == len(rows) and not layout.exchange.stages(rows.device):
        return rows
    return _WithHalo.apply(rows, layout, plan.group)


def without_halo(rows: torch.Tensor, plan: RankPlan, width: int) -> torch.Tensor:
    """Return the rows (T_r, D) of this rank's own tokens among those of [`with_halo`], (T_p, D)."""
    return take_rows(rows, plan.halo_for(width).on(rows.device).kept)


def take_rows(source: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return `rows` of a tensor (T, ...), none of them twice, as a contiguous tensor (n, ...)."""
    if rows.ranges == ((0, len(source)),):
        return source
    return _TakeRows.apply(source, rows)


class _WithHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, layout: HaloLayout, group):
        ctx.layout, ctx.group = layout, group
        exchange, maps = layout.exchange, layout.on(rows.device)
        sent = exchange.send_rows(rows.device).take(rows).contiguous()
        transfers = [
            send_rows(sent, rows.new_empty(stage.received, rows.shape[1]), stage, group, HALO)
            for stage in exchange.stages(rows.device)
        ]
        padded = rows.new_zeros(layout.num_padded, rows.shape[1])
        maps.kept.put(padded, rows)
        maps.own_places.put(padded, maps.own_sources.take(rows))
        for transfer in transfers:
            maps.places.put(padded, maps.sources.take(transfer.wait()))
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        exchange, maps = ctx.layout.exchange, ctx.layout.on(grad.device)
        grad_rows = maps.kept.take(grad).clone()
        maps.own_sources.add_all(grad_rows, maps.own_places.take(grad))
        sent = exchange.send_rows(grad.device)
        for stage in exchange.stages(grad.device):
            of_received = grad.new_zeros(stage.received, grad.shape[1])
            maps.sources.add_all(of_received, maps.places.take(grad))
            returned = grad.new_empty(sent.count, grad.shape[1])
            return_grads(of_received, returned, stage, ctx.group, GRADIENTS).wait()
            sent.add_all(grad_rows, returned)
        return grad_rows, None, None


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, rows):
        ctx.rows, ctx.count = rows, len(source)
        return rows.take(source).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        result = grad.new_zeros(ctx.count, *grad.shape[1:])
        ctx.rows.put(result, grad)
        return result, None
