"""Base class of variable-length (varlen) kernels, which process many sequences in one call."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from ...layout import Parts, Rectangle, Rows, accumulate_dtype
from ...layout.sums import sum_parts
from ...layout.upload import upload
from ...plan.kernel_calls import GRIDS, Grid, deal_calls, folds_heads
from ...plan.ranges import Ranges
from .base import BackwardInputs, Gradients, ScoreOptions, pad_heads


ALIGNMENT = 16  # bytes that FlashAttention's kernels load at a time


class Sequences(NamedTuple):
    """The sequences of a varlen call, none of which is empty on either side.

    The cumulative lengths are int32 (n + 1,) and run from 0 to the number of rows. `max_seqlen_q` is at least 2. The
    places where sequences start, int32 (n,), are given to kernels that read rows where they are. Tensors then have
    other rows, too; otherwise they have those of the sequences, one after the other.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_queries: int = 0
    num_keys: int = 0
    starts_q: torch.Tensor | None = None
    starts_k: torch.Tensor | None = None


class Call(NamedTuple):
    """The rectangles of one varlen call, as rows of the queries and of the keys."""

    queries: Rows
    keys: Rows
    sequences: Sequences


class Calls(NamedTuple):
    """The calls for some rectangles, and where their results belong: among the rows of all rectangles, one after
    another, and among all keys."""

    calls: tuple[Call, ...]
    queries: Parts
    keys: Parts


class VarlenKernel:
    """Base class of kernels that compute rectangles with varlen calls. Causal rectangles are aligned bottom-right.

    [`~plan.kernel_calls`] describes how rectangles are divided into calls, in forward and in backward each according
    to the kernel's grid. Calls are cached by their rectangles, together with their index tensors on the device, so
    that the layers of a batch do not wait for the host.

    A subclass makes the calls. Their tensors have shape (rows, heads, D), with the last dimension contiguous and rows
    and heads aligned to `ALIGNMENT` bytes, and logsumexp (H_q, rows) is contiguous. If the kernel's grids are
    `in_place`, inputs may have other rows, too, see [`Sequences`]; results and logsumexp have those of the call.

    Args:
        deterministic: whether backward must be bitwise reproducible.
    """

    name: str
    grids = GRIDS["torch_flash"]
    expands_kv_gradients = False
    """Whether backward allocates gradients of keys and values for all query heads."""

    def __init__(self, deterministic: bool = False):
        self.deterministic = deterministic

    def widths(self, key_dim: int, value_dim: int) -> tuple[int, int]:
        """Return the widths to which heads of keys and of values are padded with zeros: by default a common one that
        is a multiple of 8."""
        width = -(-max(key_dim, value_dim) // 8) * 8
        return width, width

    def _forward_call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences, options: ScoreOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out (rows, H_q, D) and logsumexp (H_q, rows)."""
        raise NotImplementedError

    def _backward_call(
        self, inputs: BackwardInputs, sequences: Sequences, options: ScoreOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of query, key and value, with the same shapes."""
        raise NotImplementedError

    def forward(self, query, key, value, rectangles, options):
        heads, value_dim = query.shape[0], value.shape[-1]
        calls, where, _ = varlen_calls(tuple(rectangles), self.grids.forward, heads, key.shape[1], query.device)
        key_width, value_width = self.widths(key.shape[-1], value_dim)
        query, key, value = _rows_first(key_width, query, key) + _rows_first(value_width, value)
        outs, sums = zip(*(self._forward(c, query, key, value, options) for c in calls))
        outs = [_narrowed(out, value_dim).transpose(0, 1) for out in outs]
        if len(calls) == 1:
            return outs[0], sums[0]
        lse = query.new_empty(heads, where.count, dtype=accumulate_dtype(query.dtype))
        for rows, part in zip(where.rows, sums):
            rows.put(lse, part, dim=1)
        return sum_parts(outs, where, outs[0]), lse

    def _forward(self, c: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: ScoreOptions):
        if self.grids.forward.in_place:
            return self._forward_call(query, key, value, c.sequences, options)
        return self._forward_call(c.queries.take(query), c.keys.take(key), c.keys.take(value), c.sequences, options)

    def backward(self, inputs, rectangles, options):
        grad_out, query, key, value, out, lse = likes = inputs
        heads, groups = query.shape[0], query.shape[0] // key.shape[0]
        key_width, value_width = self.widths(key.shape[-1], value.shape[-1])
        query, key = _rows_first(key_width, query, key)
        value, grad_out, out = _rows_first(value_width, value, grad_out, out)
        inputs = BackwardInputs(grad_out, query, key, value, out, lse)
        calls, queries, keys = varlen_calls(tuple(rectangles), self.grids.backward, heads, key.shape[0], query.device)
        parts = zip(*(self._backward(c, groups, inputs, options) for c in calls))
        # Each row occurs once per call, and the order of calls is fixed, and so is that of every sum.
        return Gradients(
            *(
                sum_parts([_narrowed(grad, like.shape[-1]).transpose(0, 1) for grad in of_calls], where, like)
                for of_calls, where, like in zip(parts, (queries, keys, keys), likes[1:4])
            )
        )

    def _backward(self, c: Call, groups: int, inputs: BackwardInputs, options: ScoreOptions):
        """Call backward on the rows of a call. Rows that are copied for it are freed when it returns."""
        grad_out, query, key, value, out, lse = inputs
        folds = self.expands_kv_gradients and not options.causal and groups > 1
        fold = groups if folds and folds_heads(c.queries.count, c.keys.count) else 1
        lse_rows = _folded_lse(c.queries.take(lse, dim=1), fold)
        if self.grids.backward.in_place and fold == 1:
            return self._backward_call(inputs._replace(lse=lse_rows), c.sequences, options)
        taken = BackwardInputs(
            _folded(c.queries.take(grad_out), fold),
            _folded(c.queries.take(query), fold),
            c.keys.take(key),
            c.keys.take(value),
            _folded(c.queries.take(out), fold),
            lse_rows,
        )
        grad_query, *grads = self._backward_call(taken, _folded_sequences(c.sequences, fold), options)
        return _unfolded(grad_query, fold), *grads


def _folded(tensor: torch.Tensor, fold: int) -> torch.Tensor:
    """Return a tensor (rows, H_q, D) as (rows * fold, H_q / fold, D).

    Row i * fold + g has query i of head g of each group of `fold` heads.
    """
    return tensor if fold == 1 else tensor.unflatten(1, (-1, fold)).transpose(1, 2).flatten(0, 1)


def _unfolded(tensor: torch.Tensor, fold: int) -> torch.Tensor:
    """Reverse [`_folded`]."""
    return tensor if fold == 1 else tensor.unflatten(0, (-1, fold)).transpose(1, 2).flatten(1, 2)


def _folded_lse(lse: torch.Tensor, fold: int) -> torch.Tensor:
    """Return logsumexp (H_q, rows) as contiguous (H_q / fold, rows * fold), in the order of [`_folded`]."""
    return lse.unflatten(0, (-1, fold)).transpose(1, 2).flatten(1).contiguous()


@lru_cache(maxsize=64)
def _folded_sequences(sequences: Sequences, fold: int) -> Sequences:
    if fold == 1:
        return sequences
    return sequences._replace(
        cu_seqlens_q=sequences.cu_seqlens_q * fold,
        max_seqlen_q=sequences.max_seqlen_q * fold,
        num_queries=sequences.num_queries * fold,
        starts_q=None,
        starts_k=None,
    )


def _rows_first(width: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return tensors (heads, T, D) as (T, heads, width), with the last dimension contiguous and rows aligned."""
    tensors = pad_heads(width, *(tensor.transpose(0, 1) for tensor in tensors))
    return tuple(t if _is_aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors)


def _narrowed(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return tensor if tensor.shape[-1] == width else tensor[..., :width]


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Return whether kernels can load `ALIGNMENT` bytes at a time from every row and head.

    The values in a received row, which come after the keys, may be unaligned: after 3 heads of 12 elements in bf16
    they begin at byte 72.
    """
    steps = [tensor.storage_offset(), *(step for step, n in zip(tensor.stride()[:-1], tensor.shape) if n > 1)]
    return tensor.stride(-1) == 1 and all(step * tensor.element_size() % ALIGNMENT == 0 for step in steps)


def varlen_calls(
    rectangles: tuple[Rectangle, ...], grid: Grid, query_heads: int, num_keys: int, device: torch.device
) -> Calls:
    """Divide rectangles into varlen calls, see [`~plan.kernel_calls`]. Results are cached."""
    return _calls_on(rectangles, _dealt(rectangles, grid, query_heads), num_keys, grid.in_place, device)


@lru_cache(maxsize=128)
def _dealt(rectangles: tuple[Rectangle, ...], grid: Grid, query_heads: int) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, deal_calls(rectangles, grid, query_heads)))


@lru_cache(maxsize=64)
def _calls_on(
    rectangles: tuple[Rectangle, ...],
    dealt: tuple[tuple[int, ...], ...],
    num_keys: int,
    in_place: bool,
    device: torch.device,
) -> Calls:
    first_rows = [0, *accumulate(rectangle.queries for rectangle in rectangles)]
    calls = [[rectangles[index] for index in indices] for indices in dealt]
    rows = [_rows(((first_rows[index], first_rows[index + 1]) for index in indices), device) for indices in dealt]
    return Calls(
        tuple(_call(each, in_place, device) for each in calls),
        Parts(rows, first_rows[-1], device),
        Parts([_rows((r[2:] for r in each), device) for each in calls], num_keys, device),
    )


def _call(rectangles: list[Rectangle], in_place: bool, device: torch.device) -> Call:
    queries, keys = [each.queries for each in rectangles], [each.keys for each in rectangles]
    # With a maximum of 1 query, flash-attn takes its decoding path, which swaps rows and heads.
    longest = max(2, *queries), max(keys)
    counts = sum(queries), sum(keys)
    starts = [[each.q_start for each in rectangles], [each.k_start for each in rectangles]] if in_place else []
    return Call(
        _rows((each[:2] for each in rectangles), device),
        _rows((each[2:] for each in rectangles), device),
        Sequences(
            _whole_numbers([0, *accumulate(queries)], device),
            _whole_numbers([0, *accumulate(keys)], device),
            *longest,
            *counts,
            *(_whole_numbers(first, device) for first in starts),
        ),
    )


def _rows(ranges: Iterable[tuple[int, ...]], device: torch.device) -> Rows:
    return Rows(Ranges.of(ranges)).to(device)


def _whole_numbers(numbers: list[int], device: torch.device) -> torch.Tensor:
    return upload(torch.tensor(numbers, dtype=torch.int32), device)
