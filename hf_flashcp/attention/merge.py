"""Merging partial outputs: attention over a set of keys, computed from the attention over disjoint parts of it.

Partial results are weighted by their logsumexp, as in FlashAttention's combine step. On CUDA a single fused kernel
merges all parts of a layer and its sinks: it reads every part once and writes the output once, in its own dtype.
Elsewhere parts are merged one after the other, in the accumulate dtype if any row is merged more than once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..exchange import named_range
from ..layout import Rows, accumulate_dtype, fused
from ..layout.parts import Parts
from ..layout.sums import sum_parts
from . import fused_merge
from .kernels.base import merge_logsumexp


Partial = tuple[torch.Tensor, torch.Tensor]
"""Output (H_q, n, D_v) in the query's dtype and logsumexp (H_q, n) of n rows over some of their keys."""

_ROWS_AT_ONCE_ON_CPU = 256  # small enough for intermediates to stay in the cache, measured to be three times as fast


def merge_parts(parts: Sequence[Partial], where: Parts, sinks: torch.Tensor | None) -> Partial:
    """Return the output (H_q, T, D_v) and logsumexp (H_q, T) over the keys of all parts, and over the sinks.

    Args:
        parts: partial results over disjoint keys. Those of the first part are overwritten.
        where: the rows that each part covers. Either the first part covers all of them, or no row is covered twice.
        sinks: (H_q,) one more score per head in every softmax, which has no value.
    """
    if where.begins_whole:
        (out, lse), *others = parts
    else:
        assert where.disjoint and where.complete, "parts must extend a first part of all rows, or not overlap"
        outs, sums = zip(*parts)
        out = sum_parts(outs, where, outs[0])
        lse = sum_parts([each.unsqueeze(-1) for each in sums], where, sums[0].unsqueeze(-1)).squeeze(-1)
        others = []
    if not others and sinks is None:
        return out, lse
    with named_range("merge"):
        if fused.runs_on(out):
            return fused_merge.merge_parts(out, lse, others, where, sinks)
        dtype = out.dtype
        if where.most > 2 or sinks is not None:
            out = out.to(accumulate_dtype(dtype))
        for rows, (part, part_lse) in zip(where.rows[1:], others):
            merge(out, lse, part, part_lse, rows)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        return out.to(dtype), lse


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, rows: Rows) -> None:
    """Merge a partial result over other keys, part (H_q, n, D_v) and part_lse (H_q, n), into `rows` of out (H_q, T,
    D_v) and lse (H_q, T), in place."""
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


def add_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> Partial:
    """Return `out` and `lse` with one more score per head in every softmax, `sinks` (H_q,), which has no value."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(-1))
    return out * (lse - total).exp().unsqueeze(-1), total
