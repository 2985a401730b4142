"""Merging partial outputs: attention over two disjoint sets of keys, from the attention over each."""

from __future__ import annotations

import torch

from ..exchange import named_range
from ..layout import Rows
from .kernels.base import accumulate_dtype, merge_logsumexp


_ROWS_AT_ONCE_ON_CPU = 256  # whose intermediates stay in the cache: measured three times as fast


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, rows: Rows) -> None:
    """Merges a partial result, part (H_q, n, D_v) and part_lse (H_q, n) over other keys, into `rows` of out (H_q, T,
    D_v) and lse (H_q, T) by their logsumexp, in place (FlashAttention's combine step)."""
    with named_range("merge"):
        if rows.index is None:
            for there, here in rows.pieces(_ROWS_AT_ONCE_ON_CPU if out.device.type == "cpu" else None):
                _combine(out[:, there], lse[:, there], part[:, here], part_lse[:, here])
            return
        # Rows before heads, as kernels return outputs: whole rows are copied at a time.
        by_row = out.transpose(0, 1)
        found, found_lse = rows.take(by_row), rows.take(lse, dim=1)
        _combine(found.transpose(0, 1), found_lse, part, part_lse)
        rows.put(by_row, found)
        rows.put(lse, found_lse, dim=1)


def _combine(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    dtype = accumulate_dtype(out.dtype)
    weight = merge_logsumexp(lse, part_lse).unsqueeze(-1)
    if out.dtype == dtype:
        out.lerp_(part.to(dtype), weight)
    else:
        out.copy_(out.to(dtype).lerp_(part.to(dtype), weight))


def add_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `out` and `lse` with one more term in the softmax of every row: a score per head (H_q,) that has no
    value."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(-1))
    return out * (lse - total).exp().unsqueeze(-1), total
