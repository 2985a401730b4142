"""The interface of attention kernels, and the arithmetic that kernels and engine share.

Kernels do not know about ranks or documents. Shapes: query (H_q, T, D_k), key (H_kv, S, D_k), value (H_kv, S, D_v),
with any strides. Query head h uses KV head h // (H_q / H_kv).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from ...layout import Rectangle


class ScoreOptions(NamedTuple):
    """How the scores of one kernel call are computed and masked.

    Causal rectangles are aligned bottom-right: the last query sees all keys, the query before it sees all but the last
    key, and so on.
    """

    causal: bool
    scale: float
    window: int | None = None  # with `causal` only: a query sees the last `window` of the keys that it may see
    softcap: float | None = None  # scores become softcap * tanh(scaled scores / softcap)

    @property
    def only_causal(self) -> bool:
        """Whether keys are hidden by the causal mask alone, without a window."""
        return self.causal and self.window is None


class BackwardInputs(NamedTuple):
    """The tensors that a backward pass reads.

    `grad_out` and `out` are (H_q, T, D_v), and `lse` is (H_q, T) in the accumulate dtype. The others are the inputs of
    forward.
    """

    grad_out: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


class Gradients(NamedTuple):
    """Gradients of query, key and value. A layer whose keys need no gradients has `None` for the last two."""

    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None


class AttentionKernel(Protocol):
    """The interface that a kernel implements.

    Rectangles are never empty, every query sees at least one key, and query ranges are disjoint and ascending. Kernels
    that derive tensors from rectangles cache them by value, so that all layers of a batch, which pass equal tuples,
    share them.
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
        """Return out (H_q, R, D_v) in the query's dtype and logsumexp (H_q, R) in the accumulate dtype.

        R is the number of query rows in all rectangles, which are computed one after another.

        Fused kernels always round `out` to the query's dtype. The engine merges partial outputs in the accumulate
        dtype, with weights that sum to 1. Their rounding errors therefore do not add up beyond that of one output, no
        matter how many parts there are.
        """
        ...

    def backward(self, inputs: BackwardInputs, rectangles: Sequence[Rectangle], options: ScoreOptions) -> Gradients:
        """Return what the rectangles contribute to the gradients, in the query's dtype or the accumulate dtype.

        `inputs.out` and `inputs.lse` are those of the whole attention, merged from the rectangles of all calls. With
        them, each rectangle contributes exactly its share of the gradients.

        The gradient of the query is (H_q, R, D_k), with the rows of all rectangles one after another. Those of key and
        value have all S rows, which are 0 where no rectangle has them.
        """
        ...


def merge_logsumexp(lse: torch.Tensor, part_lse: torch.Tensor) -> torch.Tensor:
    """Return the weight, from 0 to 1, of the second of two outputs over disjoint sets of keys.

    Updates `lse` in place to the logsumexp over both sets.

    A row without keys has an output of 0 and a logsumexp of -inf (FlashAttention-2 writes inf), so its weight is 0.
    FlashAttention-2 also writes inf if the data made the sum NaN. The output is NaN then, and stays NaN with any
    weight.
    """
    for each in (lse, part_lse):
        each.nan_to_num_(nan=torch.nan, posinf=-torch.inf, neginf=-torch.inf)
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)
    torch.logaddexp(lse, part_lse, out=lse)
    return weight


def cut(rectangle: Rectangle, rows: int, options: ScoreOptions) -> Iterator[Rectangle]:
    """Yield rectangles of `rows` queries with the keys that these queries see; the first one may have fewer rows."""
    q_start, q_stop, k_start, k_stop = rectangle
    shift = k_stop - q_stop  # offset from a query to the last key that it sees, if causal
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
    """Return a mask (rows, keys), which is true where a query of a causal rectangle does not see a key."""
    ones = torch.ones(rows, keys, dtype=torch.bool, device=device)
    after = ones.triu(keys - rows + 1)
    return after if window is None else after.logical_or_(ones.tril(keys - rows - window))


def pad_heads(width: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors, padded with zeros to `width` in their last dimension."""
    return tuple(F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in tensors)
