"""The attention of one layer on one rank in float64, and the largest differences from it that rounding explains.

Every rank computes the attention of its own queries to each whole document, without exchange and merging. It processes
one KV head at a time and queries in blocks, so that at most about 2**24 scores exist at a time.

Let u be the unit roundoff of the tensors' dtype, and w the unit roundoff of the dtype in which products are summed:
fp64 for fp64, otherwise fp32. (In fp32, `torch.get_float32_matmul_precision` determines both.) A result x of one token
and head may differ, in the 2-norm, by

    16 (u + w (sqrt(keys) + |q| |k| scale)) (|x| + spread)

The spread is the combined effect of independent errors of one unit in every term of the result's sums: the root of
sum p^2 |v|^2 for out = sum p v, of sum p^2 |dO|^2 for dV, of sum ds^2 |k|^2 for dQ, and of sum ds^2 |q|^2 for dK. For
dQ and dK it also includes the error of dO . out, which all terms of a query share. A logsumexp may differ by
16 (u + w (...) (1 + |x|)).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..distributed import add_over_ranks, gather_rows
from ..layout import RankPlan, Rectangle, accumulate_dtype
from ..layout.rank_layout import token_index
from .kernels.base import ScoreOptions, cut, hidden


MOST_SCORES = 2**24  # largest number of scores that exist at a time
_ROUNDINGS = 16
_MATMUL_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}


class Expected(NamedTuple):
    """The expected values of some heads and rows of a result (heads, T_r, D)."""

    heads: slice
    rows: slice
    values: torch.Tensor  # (H, n, D) float64
    limits: torch.Tensor  # (H, n), largest difference of each row that rounding explains, in the 2-norm


class Head(NamedTuple):
    """One KV head of the whole packed row: keys (C, D_k), values (C, D_v), and the query heads that use them."""

    number: int
    queries: slice
    key: torch.Tensor
    value: torch.Tensor


class Scores(NamedTuple):
    """The scores of n local rows in H query heads against the m keys of the packed row that these rows see."""

    rows: slice
    keys: slice
    query: torch.Tensor  # (H, n, D_k)
    scores: torch.Tensor  # (H, n, m), 0 where masked
    share: torch.Tensor  # (H, n, m), softmax probabilities
    lse: torch.Tensor  # (H, n)
    out: torch.Tensor  # (H, n, D_v)
    sum_roundoff: float  # w (sqrt(keys) + ...) in the module's formula
    roundoff: float  # u + sum_roundoff


class Reference:
    """The formulas of attention in float64, for this rank's queries of one layer. Every rank of the group calls it.

    Args:
        plan: plan of the packed row.
        options: scale, window and softcap of the layer.
        sinks: (H_q,) attention sinks, if the layer has them.
        dtype: dtype of the results to compare with.
    """

    def __init__(self, plan: RankPlan, options: ScoreOptions, sinks: torch.Tensor | None, dtype: torch.dtype):
        self._plan, self._options, self._sinks, self._dtype = plan, options, sinks, dtype
        self._starts = [0, *itertools.accumulate(plan.plan.lengths)]

    def heads(self, key: torch.Tensor, value: torch.Tensor, query_heads: int) -> Iterator[Head]:
        """Gather key (H_kv, T_r, D_k) and value (H_kv, T_r, D_v) from all ranks, one head at a time."""
        plan, groups = self._plan.plan, query_heads // key.shape[0]
        places = [torch.from_numpy(token_index(plan, rank)).to(key.device) for rank in range(plan.cp_size)]
        counts = [len(place) for place in places]
        for number in range(key.shape[0]):
            mine = torch.cat([key[number], value[number]], dim=-1)
            row = mine.new_empty(plan.num_tokens, mine.shape[1])
            for place, part in zip(places, gather_rows(mine, counts, self._plan.group)):
                row[place] = part
            queries = slice(number * groups, (number + 1) * groups)
            yield Head(number, queries, *row.double().split([key.shape[2], value.shape[2]], dim=-1))

    def scores(self, head: Head, query: torch.Tensor) -> Iterator[Scores]:
        """Yield the scores of all queries (H_q, T_r, D_k) of this rank for one KV head, in blocks of queries."""
        window = self._options.window
        groups = head.queries.stop - head.queries.start
        for piece in self._plan.layout.slices:
            first = self._starts[piece.document]
            seen = Rectangle(piece.row, piece.row + piece.tokens, first, first + piece.stop)
            rows = max(1, MOST_SCORES // (groups * piece.stop))
            rows = min(rows, max(window, 64)) if window else rows
            for block in cut(seen, rows, self._options):
                yield self._scores(head, query, block)

    def _scores(self, head: Head, query: torch.Tensor, block: Rectangle) -> Scores:
        _, scale, window, softcap = self._options
        rows, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        q, k = query[head.queries, rows].double(), head.key[keys]
        mask = hidden(block.queries, block.keys, window, query.device)
        scores = q @ k.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(mask, -torch.inf)
        lse = scores.logsumexp(-1)
        if self._sinks is not None:
            lse = torch.logaddexp(lse, self._sinks[head.queries, None].double())
        share = (scores - lse[..., None]).exp()
        unit, sum_unit = _units(self._dtype)
        size = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * abs(scale)
        sum_roundoff = sum_unit * (block.keys**0.5 + size)
        out = share @ head.value[keys]
        return Scores(rows, keys, q, scores.masked_fill(mask, 0), share, lse, out, sum_roundoff, unit + sum_roundoff)

    def output(self, head: Head, block: Scores) -> Expected:
        spread = _root_sum(self._normal(block.share), head.value[block.keys])
        return Expected(head.queries, block.rows, block.out, self._limit(block.roundoff, block.out, spread))

    def logsumexp(self, head: Head, block: Scores) -> Expected:
        limit = _ROUNDINGS * (block.roundoff + block.sum_roundoff * block.lse.abs())
        return Expected(head.queries, block.rows, block.lse[..., None], limit)

    def grad_query(self, head: Head, block: Scores, grad_out: torch.Tensor, sums: KeySums) -> Expected:
        """Return the expected dQ (H, n, D_k) for grad_out (H_q, T_r, D_v), and add the block's dK and dV to `sums`."""
        _, scale, _, softcap = self._options
        k, grad_out = head.key[block.keys], grad_out[head.queries, block.rows].double()
        product = grad_out * block.out
        ds = block.share * (grad_out @ head.value[block.keys].mT - product.sum(-1, keepdim=True))
        if softcap is not None:
            ds = ds * (1 - (block.scores / softcap).square())
        error = product.norm(dim=-1)  # error of dO . out for an error of one unit in each of its terms
        spread = torch.hypot(_root_sum(self._normal(ds), k), error * (block.share @ k).norm(dim=-1))
        errors = scale * self._normal(ds), scale * error[..., None] * block.share
        sums.add(block, scale * ds, errors, grad_out, self._normal(block.share))
        grad = scale * ds @ k
        return Expected(head.queries, block.rows, grad, self._limit(block.roundoff, grad, abs(scale) * spread))

    def grads_of_keys(self, head: Head, sums: KeySums) -> tuple[Expected, Expected]:
        """Return the expected dK (1, T_r, D_k) and dV (1, T_r, D_v) of this rank's tokens.

        They and their limits are summed over the queries of all ranks.
        """
        limits = [
            self._limit(sums.roundoff, grad, 0.0) + _ROUNDINGS * squares.sqrt()
            for grad, squares in ((sums.key, sums.key_squares), (sums.value, sums.value_squares))
        ]
        total = torch.cat([sums.key, sums.value, torch.stack(limits, -1)], dim=-1)
        own = self._plan.layout.token_index.to(total.device)
        widths = [sums.key.shape[1], sums.value.shape[1], 1, 1]
        key, value, key_limit, value_limit = add_over_ranks(total, self._plan.group)[None, own].split(widths, dim=-1)
        where = slice(head.number, head.number + 1), slice(0, len(own))
        return Expected(*where, key, key_limit[..., 0]), Expected(*where, value, value_limit[..., 0])

    def _limit(self, roundoff: float | torch.Tensor, expected: torch.Tensor, spread: torch.Tensor | float):
        # Below the smallest normal number, roundoff is absolute and not relative.
        least = torch.finfo(self._dtype).tiny * expected.shape[-1] ** 0.5
        return _ROUNDINGS * roundoff * (expected.norm(dim=-1) + spread + least)

    def _normal(self, factors: torch.Tensor) -> torch.Tensor:
        """Return absolute values of at least the smallest normal number, below which fp16 keeps fewer digits."""
        return factors.abs().clamp(min=torch.finfo(self._dtype).tiny)


class KeySums:
    """Sums over this rank's queries for the keys of one head: dK (C, D_k) and dV (C, D_v) of the whole packed row.

    For the limits, it also holds the largest roundoff among the blocks of each key (C,), and the sums of squares (C,)
    of the errors in the terms of dK and dV.
    """

    def __init__(self, head: Head):
        self.key, self.value = torch.zeros_like(head.key), torch.zeros_like(head.value)
        self.roundoff, self.key_squares, self.value_squares = head.key.new_zeros(3, len(head.key))

    def add(
        self,
        block: Scores,
        ds: torch.Tensor,
        ds_errors: tuple[torch.Tensor, ...],
        grad_out: torch.Tensor,
        share_errors: torch.Tensor,
    ) -> None:
        """Add a block's ds^T q to dK and its share^T dO to dV, and the squared errors of their terms.

        The errors (H, n, m) are those of one unit in every factor.
        """
        keys, unit = block.keys, block.roundoff**2
        self.roundoff[keys].clamp_(min=block.roundoff)
        self.key[keys] += _sum_over_rows(ds, block.query)
        self.value[keys] += _sum_over_rows(block.share, grad_out)
        for errors in ds_errors:
            self.key_squares[keys] += unit * _squares_over_rows(errors, block.query)
        self.value_squares[keys] += unit * _squares_over_rows(share_errors, grad_out)


def _sum_over_rows(factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the sum (m, D), over heads and rows, of factors (H, n, m) times rows (H, n, D)."""
    return factors.flatten(0, 1).mT @ rows.flatten(0, 1)


def _squares_over_rows(factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the sum (m,), over heads and rows, of factors^2 |row|^2, for factors (H, n, m) and rows (H, n, D)."""
    return factors.flatten(0, 1).square().mT @ rows.square().sum(-1).flatten()


def _root_sum(factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the root (..., n) of the sum of factors^2 |row|^2, for factors (..., n, m) and rows (m, D)."""
    return (factors.square() @ rows.square().sum(-1)).sqrt()


def _units(dtype: torch.dtype) -> tuple[float, float]:
    """Return the unit roundoff of `dtype`, and that of sums of products of such numbers."""
    if dtype == torch.float32:
        return (_MATMUL_ROUNDOFF[torch.get_float32_matmul_precision()],) * 2
    return torch.finfo(dtype).eps / 2, torch.finfo(accumulate_dtype(dtype)).eps / 2
