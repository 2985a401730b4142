"""Base class of variable-length (varlen) kernels, which process many sequences in one call."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ...layout import Rectangle, Rows
from ...layout.rows import row_numbers
from .base import BackwardInputs, ScoreOptions, accumulate_dtype, pad_heads


ALIGNMENT = 16  # bytes that FlashAttention's kernels load at a time


class Sequences(NamedTuple):
    """The sequences of a varlen call, none of which is empty on either side.

    The cumulative lengths are int32 (n + 1,) and run from 0 to the number of rows. `max_seqlen_q` is at least 2.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Round(NamedTuple):
    """The rectangles of one varlen call, as rows of the queries, of the keys, and of the output of all rounds."""

    queries: Rows
    keys: Rows
    outputs: Rows
    sequences: Sequences


class VarlenKernel:
    """Base class of kernels that compute rectangles with varlen calls. Causal rectangles are aligned bottom-right.

    The key ranges of one call must be disjoint, but two slices of a document can attend to overlapping ranges of its
    keys. Therefore the rectangles are distributed, in order, over as few rounds as possible, and each round is one
    call. For example, two slices of one document that attend to two prefixes of its received keys need two rounds,
    which the rectangles of other documents share:

        rectangles     rows 0-2 x keys 0-4     rows 3-5 x keys 0-9     rows 6-9 x keys 10-12
        round 1        rows 0-2 x keys 0-4                             rows 6-9 x keys 10-12
        round 2                                rows 3-5 x keys 0-9

    Rounds are cached by their rectangles, together with their index tensors on the device, so that the layers of a
    batch do not wait for the host. Heads are padded with zeros to a common width that is a multiple of 8.

    A subclass makes the calls. Their tensors have shape (rows, heads, D), with the last dimension contiguous and rows
    and heads aligned to `ALIGNMENT` bytes, and logsumexp (H_q, rows) is contiguous.

    Args:
        deterministic: whether backward must be bitwise reproducible.
    """

    name: str

    def __init__(self, deterministic: bool = False):
        self.deterministic = deterministic

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
        rounds = deal_rounds(tuple(rectangles), query.device)
        heads, value_width = query.shape[0], value.shape[-1]
        query, key, value = _rows_first(query, key, value)
        parts = [
            self._forward_call(r.queries.take(query), r.keys.take(key), r.keys.take(value), r.sequences, options)
            for r in rounds
        ]
        if len(parts) == 1:
            out, lse = parts[0]
            return out[..., :value_width].transpose(0, 1), lse
        num_rows = sum(r.outputs.count for r in rounds)
        out = query.new_empty(num_rows, heads, value_width)
        lse = query.new_empty(heads, num_rows, dtype=accumulate_dtype(query.dtype))
        for r, (part, part_lse) in zip(rounds, parts):
            r.outputs.put(out, part[..., :value_width])
            r.outputs.put(lse, part_lse, dim=1)
        return out.transpose(0, 1), lse

    def backward(self, inputs, rectangles, options, grads):
        grad_out, query, key, value, out = _rows_first(*inputs[:-1])
        for r in deal_rounds(tuple(rectangles), query.device):
            # No variable refers to the rows taken here, so that they are freed as soon as the call is over.
            found = self._backward_call(
                BackwardInputs(
                    r.queries.take(grad_out),
                    r.queries.take(query),
                    r.keys.take(key),
                    r.keys.take(value),
                    r.queries.take(out),
                    r.queries.take(inputs.lse, dim=1).contiguous(),
                ),
                r.sequences,
                options,
            )
            # Each row occurs once per round, and rounds run one after another, so the order of every sum is fixed.
            for total, rows, grad in zip(grads, (r.queries, r.keys, r.keys), found):
                rows.add(total.transpose(0, 1), grad[..., : total.shape[-1]])


def _rows_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return tensors (heads, T, D) as (T, heads, width), with the last dimension contiguous and rows aligned."""
    width = max(tensor.shape[-1] for tensor in tensors)
    tensors = pad_heads(-(-width // 8) * 8, *(tensor.transpose(0, 1) for tensor in tensors))
    return tuple(t if _is_aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors)


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Return whether kernels can load `ALIGNMENT` bytes at a time from every row and head.

    The values in a received row, which come after the keys, may be unaligned: after 3 heads of 12 elements in bf16
    they begin at byte 72.
    """
    steps = [tensor.storage_offset(), *(step for step, n in zip(tensor.stride()[:-1], tensor.shape) if n > 1)]
    return tensor.stride(-1) == 1 and all(step * tensor.element_size() % ALIGNMENT == 0 for step in steps)


@lru_cache(maxsize=64)
def deal_rounds(rectangles: tuple[Rectangle, ...], device: torch.device) -> tuple[Round, ...]:
    """Distribute rectangles over as few rounds as possible, each with disjoint key ranges, see [`VarlenKernel`]."""
    dealt: list[list[tuple[Rectangle, int]]] = []  # per round: rectangles, and the row where the output of each begins
    row = 0
    for rectangle in rectangles:
        for entries in dealt:
            if entries[-1][0].k_stop <= rectangle.k_start:
                entries.append((rectangle, row))
                break
        else:
            dealt.append([(rectangle, row)])
        row += rectangle.queries
    return tuple(_round(entries, device) for entries in dealt)


def _round(entries: list[tuple[Rectangle, int]], device: torch.device) -> Round:
    queries, keys = [each.queries for each, _ in entries], [each.keys for each, _ in entries]
    # With a maximum of 1 query, flash-attn takes its decoding path, which swaps rows and heads.
    longest = max(2, *queries), max(keys)
    return Round(
        Rows(row_numbers((each.q_start, each.q_stop) for each, _ in entries), device),
        Rows(row_numbers((each.k_start, each.k_stop) for each, _ in entries), device),
        Rows(row_numbers((row, row + each.queries) for each, row in entries), device),
        Sequences(_cumulative(queries, device), _cumulative(keys, device), *longest),
    )


def _cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
