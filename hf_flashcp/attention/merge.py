"""Merging partial outputs: attention over a set of keys, computed from the attention over disjoint parts of it."""

from __future__ import annotations

import torch

from ..exchange import named_range
from ..layout import Rows
from .kernels.base import accumulate_dtype, merge_logsumexp


_ROWS_AT_ONCE_ON_CPU = 256  # small enough for intermediates to stay in the cache, measured to be three times as fast


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, rows: Rows) -> None:
    """Merge a partial result over other keys into `rows` of out (H_q, T, D_v) and lse (H_q, T), in place.

    The partial result, part (H_q, n, D_v) and part_lse (H_q, n), is weighted by its logsumexp, as in FlashAttention's
    combine step.
    """
    with named_range("merge"):
        if rows.index is None:
            for target, source in rows.pieces(_ROWS_AT_ONCE_ON_CPU if out.device.type == "cpu" else None):
                _combine(out[:, target], lse[:, target], part[:, source], part_lse[:, source])
            return
        # Rows come before heads, as in the outputs of kernels, so that whole rows are copied.
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
    """Return `out` and `lse` with one more score per head in every softmax, `sinks` (H_q,), which has no value."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(-1))
    return out * (lse - total).exp().unsqueeze(-1), total
