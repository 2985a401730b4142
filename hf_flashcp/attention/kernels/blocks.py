"""`BlockKernel`: the loop over blocks of queries that the CPU kernels share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ...layout import Rectangle, accumulate_dtype
from .base import BackwardInputs, Gradients, ScoreOptions, merge_logsumexp


class KeyBlock(NamedTuple):
    """Keys [start, stop) of one kernel call, and the mask that hides some of them from the rows of its block."""

    start: int
    stop: int
    mask: torch.Tensor | None = None  # (rows, keys); `None` if nothing is hidden, or if `causal` is set
    causal: bool = False  # rows and keys form a square whose upper triangle the kernel hides itself


class QueryBlock(NamedTuple):
    """Queries [start, stop) and the disjoint blocks of keys that they see.

    `fold` query heads of a group are folded into the rows: row i * fold + g is query i of head g. Masks therefore have
    (stop - start) * fold rows.
    """

    start: int
    stop: int
    keys: Sequence[KeyBlock]
    fold: int


class BlockKernel:
    """Base class of kernels that compute attention block by block, and sum gradients in the accumulate dtype.

    A subclass divides rectangles into blocks, and computes one block of queries against one block of keys. Their
    shapes are (H_kv, heads, rows, D), where heads is H_q / H_kv / fold, keys and values are expanded over heads, and
    the rows include `fold` heads.
    """

    def _blocks(
        self, query: torch.Tensor, groups: int, rectangles: Sequence[Rectangle], options: ScoreOptions, backward: bool
    ) -> Iterable[QueryBlock]:
        raise NotImplementedError

    def _forward_block(self, q, k, v, keys: KeyBlock, options: ScoreOptions) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def _backward_block(
        self, inputs: BackwardInputs, keys: KeyBlock, options: ScoreOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def forward(self, query, key, value, rectangles, options):
        groups = query.shape[0] // key.shape[0]
        rows = sum(rectangle.queries for rectangle in rectangles)
        # Rows first in memory, because the layer returns (T, H, D).
        out = query.new_empty(rows, query.shape[0], value.shape[-1]).transpose(0, 1)
        lse = query.new_empty(query.shape[0], rows, dtype=accumulate_dtype(query.dtype))
        query, key, value = (_last_contiguous(tensor) for tensor in (query, key, value))
        done = 0
        for block in self._blocks(query, groups, rectangles, options, backward=False):
            split = groups // block.fold, block.fold
            q = _rows_of(query, block, split)
            parts = [
                self._forward_block(q, *_expanded(keys, q.shape[1], key, value), keys, options) for keys in block.keys
            ]
            part, part_lse = parts[0] if len(parts) == 1 else _merged(parts)
            span = slice(done, done + block.stop - block.start)
            _per_head(out[:, span], split).copy_(part.unflatten(2, (-1, block.fold)))
            _per_head(lse[:, span], split).copy_(part_lse.unflatten(2, (-1, block.fold)))
            done = span.stop
        return out, lse

    def backward(self, inputs, rectangles, options):
        heads, groups = inputs.query.shape[0], inputs.query.shape[0] // inputs.key.shape[0]
        grad_out, query, key, value, out = (_last_contiguous(tensor) for tensor in inputs[:-1])
        rows, dtype = sum(rectangle.queries for rectangle in rectangles), accumulate_dtype(query.dtype)
        grad_query = query.new_empty(rows, heads, query.shape[2]).transpose(0, 1)
        grad_key, grad_value = (
            x.new_zeros(x.shape[1], len(x), x.shape[2], dtype=dtype).transpose(0, 1) for x in (key, value)
        )
        done = 0
        for block in self._blocks(query, groups, rectangles, options, backward=True):
            split = groups // block.fold, block.fold
            do, q, o, row_lse = (_rows_of(tensor, block, split) for tensor in (grad_out, query, out, inputs.lse))
            of_keys = []
            for keys in block.keys:
                k, v = _expanded(keys, q.shape[1], key, value)
                dq, dk, dv = self._backward_block(BackwardInputs(do, q, k, v, o, row_lse), keys, options)
                of_keys.append(dq)
                for total, part in ((grad_key, dk), (grad_value, dv)):
                    total[:, keys.start : keys.stop] += _sum_heads(part, dtype)
            span = slice(done, done + block.stop - block.start)
            dq = of_keys[0] if len(of_keys) == 1 else torch.stack(of_keys).sum(0, dtype=dtype)
            _per_head(grad_query[:, span], split).copy_(dq.unflatten(2, (-1, block.fold)))
            done = span.stop
        return Gradients(grad_query, grad_key, grad_value)


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _per_head(tensor: torch.Tensor, split: tuple[int, int]) -> torch.Tensor:
    """Return a tensor (H_q, n, ...) as a view (H_kv, heads, n, fold, ...), for `split` = (heads, fold)."""
    return tensor.unflatten(0, (-1, *split)).transpose(2, 3)


def _rows_of(tensor: torch.Tensor, block: QueryBlock, split: tuple[int, int]) -> torch.Tensor:
    """Return a block's rows of a tensor (H_q, T, ...) as (H_kv, heads, n * fold, ...), copied unless fold is 1."""
    return _per_head(tensor[:, block.start : block.stop], split).flatten(2, 3)


def _expanded(keys: KeyBlock, heads: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a block's rows of tensors (H_kv, S, D) as views (H_kv, heads, n, D)."""
    return tuple(tensor[:, keys.start : keys.stop].unsqueeze(1).expand(-1, heads, -1, -1) for tensor in tensors)


def _sum_heads(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return grad[:, 0] if grad.shape[1] == 1 else grad.sum(1, dtype=dtype)


def _merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the partial results over several blocks of keys by their logsumexp, in the accumulate dtype."""
    out, lse = parts[0]
    for part, part_lse in parts[1:]:
        weight = merge_logsumexp(lse, part_lse).unsqueeze(-1)
        out = torch.lerp(out.to(lse.dtype), part.to(lse.dtype), weight)
    return out, lse
