"""The interface of attention kernels, and the loop over blocks that the kernels of the CPU share.

A kernel knows nothing of ranks or documents. Shapes: query (H_q, T, D_k), key (H_kv, S, D_k), value (H_kv, S, D_v),
any strides; query head h attends with key head h // (H_q / H_kv).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from ...layout import Rectangle


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial outputs, logsumexp and gradients are summed: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


class AttentionKernel(Protocol):
    """What a backend provides.

    With `causal` a rectangle is aligned bottom-right: its last query sees all its keys, the query before it all but
    the last, and so on. With `window`, which comes only with `causal`, a query sees no more than the last `window` of
    those. With `softcap` scores are softcap * tanh(scaled scores / softcap).

    Rectangles are never empty, every query sees a key, and query ranges are disjoint and ascending. Kernels that
    derive tensors from them keep those by value, so the layers of a batch, which hand over equal tuples, share them.
    """

    name: str

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rectangles: Sequence[Rectangle],
        *,
        causal: bool,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (H_q, R, D_v) in the query's dtype and logsumexp (H_q, R) in the accumulate dtype, for the R
        query rows of the rectangles one after the other.

        Fused kernels round `out` to the query's dtype whoever calls them. Merged in the accumulate dtype, parts weigh
        no more than their share of the keys, so their rounding adds up to no more than that of one part, however many
        there are.
        """
        ...

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        rectangles: Sequence[Rectangle],
        *,
        causal: bool,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        grad_query: torch.Tensor,
        grad_key: torch.Tensor,
        grad_value: torch.Tensor,
    ) -> None:
        """Adds the rectangles' part to the gradients, which have the accumulate dtype.

        `out` (H_q, T, D_v) and `lse` (H_q, T) are those of the whole attention, all rectangles of all calls merged:
        then each rectangle's gradients are its exact share.
        """
        ...


class Piece(NamedTuple):
    """Keys [k_start, k_stop) and what hides them from a block's rows: (rows, keys), `None` if nothing does."""

    k_start: int
    k_stop: int
    mask: torch.Tensor | None


class Block(NamedTuple):
    """Queries [q_start, q_stop) and the pieces of keys that they see, disjoint.

    `fold` heads of a group lie in the rows: row i * fold + g is query i of head g, so masks have (q_stop - q_start) *
    fold rows. With `causal` the one piece is a square without a mask, which the kernel's own causal flag hides."""

    q_start: int
    q_stop: int
    pieces: Sequence[Piece]
    fold: int
    causal: bool = False


class BlockKernel:
    """Runs attention block by block; gradients of several blocks are summed in the accumulate dtype.

    A subclass says how to cut rectangles into blocks, and runs a piece of one in shapes (H_kv, heads, rows, D): heads
    is H_q / H_kv / fold, with keys and values expanded over them, and rows has `fold` heads in it."""

    def _blocks(
        self,
        query: torch.Tensor,
        groups: int,
        rectangles: Sequence[Rectangle],
        causal: bool,
        window: int | None,
        *,
        backward: bool,
    ) -> Iterable[Block]:
        raise NotImplementedError

    def _forward_piece(self, q, k, v, mask, is_causal, scale, softcap) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def _backward_piece(self, do, q, k, v, o, lse, mask, is_causal, scale, softcap) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def forward(self, query, key, value, rectangles, *, causal, scale, window=None, softcap=None):
        groups = query.shape[0] // key.shape[0]
        rows = sum(rectangle.q_stop - rectangle.q_start for rectangle in rectangles)
        # Rows first: what the layer hands on is (T, H, D).
        out = query.new_empty(rows, query.shape[0], value.shape[-1]).transpose(0, 1)
        lse = query.new_empty(query.shape[0], rows, dtype=accumulate_dtype(query.dtype))
        query, key, value = (_last_contiguous(tensor) for tensor in (query, key, value))
        done = 0
        for block in self._blocks(query, groups, rectangles, causal, window, backward=False):
            split = groups // block.fold, block.fold
            q = _rows_of(query, block.q_start, block.q_stop, split)
            parts = [
                self._forward_piece(q, *_keys(piece, q, key, value), piece.mask, block.causal, scale, softcap)
                for piece in block.pieces
            ]
            part, part_lse = parts[0] if len(parts) == 1 else _merged(parts)
            span = slice(done, done + block.q_stop - block.q_start)
            _per_head(out[:, span], split).copy_(part.unflatten(2, (-1, block.fold)))
            _per_head(lse[:, span], split).copy_(part_lse.unflatten(2, (-1, block.fold)))
            done = span.stop
        return out, lse

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
        groups = query.shape[0] // key.shape[0]
        grad_out, query, key, value, out = (_last_contiguous(x) for x in (grad_out, query, key, value, out))
        for block in self._blocks(query, groups, rectangles, causal, window, backward=True):
            q_start, q_stop, split = block.q_start, block.q_stop, (groups // block.fold, block.fold)
            do, q, o, row_lse = (_rows_of(tensor, q_start, q_stop, split) for tensor in (grad_out, query, out, lse))
            for piece in block.pieces:
                k, v = _keys(piece, q, key, value)
                dq, dk, dv = self._backward_piece(do, q, k, v, o, row_lse, piece.mask, block.causal, scale, softcap)
                _per_head(grad_query[:, q_start:q_stop], split).add_(dq.unflatten(2, (-1, block.fold)))
                grad_key[:, piece.k_start : piece.k_stop] += _sum_heads(dk, grad_key.dtype)
                grad_value[:, piece.k_start : piece.k_stop] += _sum_heads(dv, grad_value.dtype)


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _per_head(tensor: torch.Tensor, split: tuple[int, int]) -> torch.Tensor:
    """(H_q, n, ...) as a view (H_kv, heads, n, fold, ...) for `split` = (heads, fold)."""
    return tensor.unflatten(0, (-1, *split)).transpose(2, 3)


def _rows_of(tensor: torch.Tensor, start: int, stop: int, split: tuple[int, int]) -> torch.Tensor:
    """Rows of (H_q, T, ...) as (H_kv, heads, n * fold, ...), copied unless fold is 1."""
    return _per_head(tensor[:, start:stop], split).flatten(2, 3)


def _keys(piece: Piece, q: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t[:, piece.k_start : piece.k_stop].unsqueeze(1).expand(-1, q.shape[1], -1, -1) for t in tensors)


def _sum_heads(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return grad[:, 0] if grad.shape[1] == 1 else grad.sum(1, dtype=dtype)


def merge_logsumexp(lse: torch.Tensor, part_lse: torch.Tensor) -> torch.Tensor:
    """Returns what the second of two outputs over disjoint sets of keys weighs against the first, from 0 to 1, and
    makes `lse` the logsumexp over both sets.

    A row without keys has an output of 0 and a logsumexp of -inf, or of inf as FlashAttention-2 writes it: it weighs
    nothing. FlashAttention-2 writes inf as well where data made the sum NaN; the output is NaN there, and stays NaN
    whatever it weighs.
    """
    for each in (lse, part_lse):
        each.nan_to_num_(nan=torch.nan, posinf=-torch.inf, neginf=-torch.inf)
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)
    torch.logaddexp(lse, part_lse, out=lse)
    return weight


def _merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all the pieces from that over each, by their logsumexp, in the accumulate dtype."""
    out, lse = parts[0]
    for part, part_lse in parts[1:]:
        weight = merge_logsumexp(lse, part_lse).unsqueeze(-1)
        out = torch.lerp(out.to(lse.dtype), part.to(lse.dtype), weight)
    return out, lse


def cut(rectangle: Rectangle, rows: int, causal: bool, window: int | None) -> Iterator[Rectangle]:
    """Rectangles of `rows` queries, the first of what is left over, with the keys that any of them sees."""
    q_start, q_stop, k_start, k_stop = rectangle
    shift = k_stop - q_stop  # from a query to the last key that it sees, if causal
    first = q_start
    while first < q_stop:
        last = first + ((q_stop - first) % rows or rows)
        yield Rectangle(
            first,
            last,
            max(k_start, first + shift - window + 1) if window else k_start,
            last + shift if causal else k_stop,
        )
        first = last


def hidden(rows: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(rows, keys) bool, true where a causal rectangle's query does not see a key."""
    ones = torch.ones(rows, keys, dtype=torch.bool, device=device)
    after = ones.triu(keys - rows + 1)
    return after if window is None else after.logical_or_(ones.tril(keys - rows - window))


def pad_heads(width: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors with zeros behind, to `width` in their last dimension."""
    return tuple(F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in tensors)
