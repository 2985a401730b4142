"""The interface of attention kernels, and the arithmetic that kernels and engine share.

A kernel knows nothing of ranks or documents. Shapes: query (H_q, T, D_k), key (H_kv, S, D_k), value (H_kv, S, D_v),
any strides; query head h attends with key head h // (H_q / H_kv).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from ...layout import Rectangle


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial outputs, logsumexp and gradients are summed: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


class ScoreOptions(NamedTuple):
    """What shapes the scores of one kernel call. Causal rectangles are aligned bottom-right: the last query sees all
    keys, the query before it all but the last, and so on."""

    causal: bool
    scale: float
    window: int | None = None  # only with `causal`: a query sees the last `window` of the keys that this leaves it
    softcap: float | None = None  # scores are softcap * tanh(scaled scores / softcap)

    @property
    def only_causal(self) -> bool:
        """Whether the causal mask is all that hides keys."""
        return self.causal and self.window is None


class BackwardInputs(NamedTuple):
    """The tensors that a backward pass reads: (H_q, T, D_v) `grad_out` and `out`, (H_q, T) `lse` in the accumulate
    dtype, the others as forward received them."""

    grad_out: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


class Gradients(NamedTuple):
    """Gradients of query, key and value, in their shapes."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def zeros(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Gradients:
        """Zeros in the accumulate dtype, for kernels to add to."""
        dtype = accumulate_dtype(query.dtype)
        return cls(*(torch.zeros_like(tensor, dtype=dtype) for tensor in (query, key, value)))


class AttentionKernel(Protocol):
    """What a backend provides.

    Rectangles are never empty, every query sees a key, and query ranges are disjoint and ascending. Kernels that
    derive tensors from them keep those by value, so the layers of a batch, which pass equal tuples, share them.
    """

    name: str

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rectangles: Sequence[Rectangle],
        options: ScoreOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (H_q, R, D_v) in the query's dtype and logsumexp (H_q, R) in the accumulate dtype, for the R
        query rows of the rectangles one after the other.

        Fused kernels round `out` to the query's dtype whoever calls them. Merged in the accumulate dtype, parts weigh
        no more than their share of the keys, so their rounding adds up to no more than that of one part, however many
        there are.
        """
        ...

    def backward(
        self, inputs: BackwardInputs, rectangles: Sequence[Rectangle], options: ScoreOptions, grads: Gradients
    ) -> None:
        """Adds the rectangles' part to `grads`, which have the accumulate dtype.

        `inputs.out` and `inputs.lse` belong to the whole attention, the rectangles of all calls merged: with them the
        gradients of each rectangle are its exact share.
        """
        ...


def merge_logsumexp(lse: torch.Tensor, part_lse: torch.Tensor) -> torch.Tensor:
    """Returns the weight of the second of two outputs over disjoint sets of keys, from 0 to 1, and makes `lse` the
    logsumexp over both sets.

    A row without keys has an output of 0 and a logsumexp of -inf, or of inf as FlashAttention-2 writes it: it weighs
    nothing. FlashAttention-2 writes inf as well where data made the sum NaN; the output is NaN there, and stays NaN
    whatever it weighs.
    """
    for each in (lse, part_lse):
        each.nan_to_num_(nan=torch.nan, posinf=-torch.inf, neginf=-torch.inf)
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)
    torch.logaddexp(lse, part_lse, out=lse)
    return weight


def cut(rectangle: Rectangle, rows: int, options: ScoreOptions) -> Iterator[Rectangle]:
    """Yields rectangles of `rows` queries, the first with what is left over, and the keys that any of them sees."""
    q_start, q_stop, k_start, k_stop = rectangle
    shift = k_stop - q_stop  # from a query to the last key that it sees, if causal
    first = q_start
    while first < q_stop:
        last = first + ((q_stop - first) % rows or rows)
        yield Rectangle(
            first,
            last,
            max(k_start, first + shift - options.window + 1) if options.window else k_start,
            last + shift if options.causal else k_stop,
        )
        first = last


def hidden(rows: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(rows, keys) bool, true where a causal rectangle's query does not see a key."""
    ones = torch.ones(rows, keys, dtype=torch.bool, device=device)
    after = ones.triu(keys - rows + 1)
    return after if window is None else after.logical_or_(ones.tril(keys - rows - window))


def pad_heads(width: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, padded with zeros to `width` in their last dimension."""
    return tuple(F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in tensors)
