"""Adding up partial results by rows: gradients from several kernel calls, and those that come back from other ranks.

The first value of a row is written where it belongs, and further values are added to it, in the order of the parts. On
CUDA a single fused kernel reads every part once, adds in registers, and writes the result once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import fused
from .parts import Parts
from .rows import accumulate_dtype, empty_rows


def sum_parts(
    parts: Sequence[torch.Tensor], where: Parts, like: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sum by rows of `parts`, each (heads, n, D), as (heads, where.count, D) in the dtype of `like`.

    Rows that no part covers are 0. Values are added in the accumulate dtype and rounded once. Memory of the first part
    may be reused.

    Args:
        parts: the parts, in the dtype of `like` or the accumulate dtype.
        where: the rows that each of the parts covers.
        like: a tensor (heads, any, D) on the same device.
        out: (heads, where.count, D) with any strides and the dtype of `like`; receives the result.
    """
    if out is None and where.begins_whole and where.disjoint:
        return parts[0].to(like.dtype)
    if fused.runs_on(like):
        return fused.sum_parts(parts, where, like, out)
    total = _total(parts, where, like, out)
    if out is None:
        return total.to(like.dtype)
    return total if total is out else out.copy_(total)


def _total(parts: Sequence[torch.Tensor], where: Parts, like: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if where.disjoint:
        total = empty_rows(where.count, like, like.dtype) if out is None else out
        if not where.complete:
            total.zero_()
        for rows, part in zip(where.rows, parts):
            rows.put(total, part, dim=1)
        return total
    # PyTorch adds two bf16 numbers in fp32 and rounds once.
    narrow = where.most <= 2 and all(part.dtype == like.dtype for part in parts)
    dtype = like.dtype if narrow else accumulate_dtype(like.dtype)
    total, first = parts[0].to(dtype), 1
    if not where.begins_whole:
        total, first = empty_rows(where.count, like, dtype).zero_(), 0
    for rows, part in zip(where.rows[first:], parts[first:]):
        rows.add(total.transpose(0, 1), part.transpose(0, 1))
    return total
