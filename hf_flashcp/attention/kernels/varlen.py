"""Kernels that take many sequences in one call, given by cumulative lengths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ...layout import Rectangle
from .base import accumulate_dtype, pad_heads


ALIGNMENT = 16
"""Bytes that FlashAttention's kernels load at a time."""


class Sequences(NamedTuple):
    """What a varlen call is told: int32 (n + 1,) cumulative lengths, from 0 to the number of rows, and the longest of
    queries, or 2, and of keys. No sequence is empty on either side."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


Rows = slice | torch.Tensor  # of a sequence dimension; int64 (n,) where they have gaps


class Round(NamedTuple):
    """Rectangles that share one call: rows of queries, of keys, and of the output of the whole kernel call."""

    q_rows: Rows
    k_rows: Rows
    out_rows: Rows
    sequences: Sequences


class VarlenKernel:
    """Rectangles as varlen calls, causal ones aligned bottom-right.

    The key ranges of one call must be disjoint, but prefixes of a document overlap: rectangles are dealt out to as
    few rounds as that needs, in order, and each round is one call. Two slices of one document against two prefixes
    of its received keys make two rounds, whatever the other documents do:

        rectangles     rows 0-2 x keys 0-4     rows 3-5 x keys 0-9     rows 6-9 x keys 10-12
        round 1        rows 0-2 x keys 0-4                             rows 6-9 x keys 10-12
        round 2                                rows 3-5 x keys 0-9

    Rows without gaps are used where they lie, others gathered. Rounds are built once for equal rectangles and kept,
    index tensors on the device included, so that the layers of a batch do not wait for the host. Heads are padded
    with zeros to a common width that is a multiple of 8.

    A subclass makes the calls, in shapes (rows, heads, D) with the last dimension contiguous, rows and heads aligned
    to `ALIGNMENT` bytes, and logsumexp (H_q, rows) contiguous.

    Args:
        deterministic (`bool`, *optional*, defaults to `False`): backward bitwise equal from run to run.
    """

    name: str

    def __init__(self, deterministic: bool = False):
        self.deterministic = deterministic

    def _forward_call(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sequences: Sequences,
        causal: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (rows, H_q, D) and logsumexp (H_q, rows)."""
        raise NotImplementedError

    def _backward_call(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        sequences: Sequences,
        causal: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the gradients of query, key and value in their shapes."""
        raise NotImplementedError

    def forward(self, query, key, value, rectangles, *, causal, scale, window=None, softcap=None):
        rounds = deal_rounds(tuple(rectangles), query.device)
        heads, value_width = query.shape[0], value.shape[-1]
        query, key, value = _rows_first(query, key, value)
        parts = [
            self._forward_call(
                _take(query, r.q_rows),
                _take(key, r.k_rows),
                _take(value, r.k_rows),
                r.sequences,
                causal,
                scale,
                window,
                softcap,
            )
            for r in rounds
        ]
        if len(parts) == 1:
            out, lse = parts[0]
            return out[..., :value_width].transpose(0, 1), lse
        num_rows = sum(rectangle.q_stop - rectangle.q_start for rectangle in rectangles)
        out = query.new_empty(num_rows, heads, value_width)
        lse = query.new_empty(heads, num_rows, dtype=accumulate_dtype(query.dtype))
        for r, (part, part_lse) in zip(rounds, parts):
            _put(out, 0, r.out_rows, part[..., :value_width])
            _put(lse, 1, r.out_rows, part_lse)
        return out.transpose(0, 1), lse

    def backward(
        self,
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        rectangles,
        *,
        causal,
        scale,
        window=None,
        softcap=None,
        grad_query,
        grad_key,
        grad_value,
    ):
        query, key, value, out, grad_out = _rows_first(query, key, value, out, grad_out)
        for r in deal_rounds(tuple(rectangles), query.device):
            row_lse = lse[:, r.q_rows] if isinstance(r.q_rows, slice) else lse.index_select(1, r.q_rows)
            grads = self._backward_call(
                _take(grad_out, r.q_rows),
                _take(query, r.q_rows),
                _take(key, r.k_rows),
                _take(value, r.k_rows),
                _take(out, r.q_rows),
                row_lse.contiguous(),
                r.sequences,
                causal,
                scale,
                window,
                softcap,
            )
            # A row comes once a round, and the rounds one after the other: the order of every sum is fixed.
            for total, rows, grad in zip((grad_query, grad_key, grad_value), (r.q_rows, r.k_rows, r.k_rows), grads):
                total, grad = total.transpose(0, 1), grad[..., : total.shape[-1]]
                if isinstance(rows, slice):
                    total[rows].add_(grad)
                else:
                    total.index_add_(0, rows, grad.to(total.dtype))


def _rows_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(heads, T, D) tensors as (T, heads, width), the last dimension contiguous and every row of a head aligned."""
    width = max(tensor.shape[-1] for tensor in tensors)
    tensors = pad_heads(-(-width // 8) * 8, *(tensor.transpose(0, 1) for tensor in tensors))
    return tuple(tensor if _is_aligned(tensor) else _copied(tensor) for tensor in tensors)


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Whether kernels can load `ALIGNMENT` bytes at a time. Values that lie behind keys in a received row need not
    be: with 3 heads of 12 they begin at byte 72."""
    steps = [tensor.storage_offset(), *(step for step, n in zip(tensor.stride()[:-1], tensor.shape) if n > 1)]
    return tensor.stride(-1) == 1 and all(step * tensor.element_size() % ALIGNMENT == 0 for step in steps)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _take(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _put(tensor: torch.Tensor, dim: int, rows: Rows, part: torch.Tensor) -> None:
    if isinstance(rows, slice):
        tensor.narrow(dim, rows.start, rows.stop - rows.start).copy_(part)
    else:
        tensor.index_copy_(dim, rows, part)


@lru_cache(maxsize=64)
def deal_rounds(rectangles: tuple[Rectangle, ...], device: torch.device) -> tuple[Round, ...]:
    dealt: list[list[tuple[Rectangle, int]]] = []
    row = 0
    for rectangle in rectangles:
        for entries in dealt:
            if entries[-1][0].k_stop <= rectangle.k_start:
                entries.append((rectangle, row))
                break
        else:
            dealt.append([(rectangle, row)])
        row += rectangle.q_stop - rectangle.q_start
    return tuple(_round(entries, device) for entries in dealt)


def _round(entries: list[tuple[Rectangle, int]], device: torch.device) -> Round:
    queries = [(rectangle.q_start, rectangle.q_stop) for rectangle, _ in entries]
    keys = [(rectangle.k_start, rectangle.k_stop) for rectangle, _ in entries]
    outputs = [(row, row + rectangle.q_stop - rectangle.q_start) for rectangle, row in entries]
    # A longest of 1 query would send flash-attn down its decoding path, which trades rows for heads.
    longest = max(2, _longest(queries)), _longest(keys)
    sequences = Sequences(_cumulative(queries, device), _cumulative(keys, device), *longest)
    return Round(_rows(queries, device), _rows(keys, device), _rows(outputs, device), sequences)


Spans = Sequence[tuple[int, int]]


def _longest(spans: Spans) -> int:
    return max(stop - start for start, stop in spans)


def _cumulative(spans: Spans, device: torch.device) -> torch.Tensor:
    lengths = torch.tensor([0, *(stop - start for start, stop in spans)], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def _rows(spans: Spans, device: torch.device) -> Rows:
    if all(first[1] == second[0] for first, second in zip(spans, spans[1:])):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(start, stop) for start, stop in spans]).to(device, non_blocking=True)
