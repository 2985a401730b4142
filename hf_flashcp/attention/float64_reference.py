"""What float64 gives for the attention of one layer on one rank, and by how much rounding explains a difference.

Every rank attends with its own queries to each document in one piece, without exchange, parts or merging, one KV head
at a time and queries in blocks: no more than about 2**24 scores exist at a time.

Let u be the unit roundoff of the tensors' dtype, and w that in which products are summed (that of fp32, or of fp64 for
fp64; in fp32 both are what `torch.get_float32_matmul_precision` allows). A result x of one token and head may be off,
in the 2-norm, by

    16 (u + w (sqrt(keys) + |q| |k| scale)) (|x| + spread)

The spread is what errors of one unit in every term of its sums add up to, independent of each other: for out = sum p v
it is the root of sum p^2 |v|^2, for dV of sum p^2 |dO|^2, for dQ and dK of sum ds^2 |k|^2 and of sum ds^2 |q|^2, with
what an error of dO . out adds, which all terms of a query share. A logsumexp may be off by 16 (u + w (...) (1 + |x|)).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..distributed import add_over_ranks, gather_rows
from ..layout import RankPlan, Rectangle
from ..layout.rank_layout import token_index
from .kernels.base import ScoreOptions, accumulate_dtype, cut, hidden


MOST_SCORES = 2**24  # that exist at a time
_ROUNDINGS = 16
_MATMUL_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}


class Expected(NamedTuple):
    """What float64 gives for some rows of a result (heads, T_r, D) in some heads."""

    heads: slice
    rows: slice
    values: torch.Tensor  # (H, n, D)
    limits: torch.Tensor  # (H, n), by how much rounding may move each row, in the 2-norm


class Head(NamedTuple):
    """Keys (C, D_k) and values (C, D_v) of KV head `number` for the whole packed row, and the query heads that attend
    to them."""

    number: int
    queries: slice
    key: torch.Tensor
    value: torch.Tensor


class Scores(NamedTuple):
    """`rows` n of the local sequence in H query heads against `keys` m of the packed row, all that they see."""

    rows: slice
    keys: slice
    query: torch.Tensor  # (H, n, D_k)
    scores: torch.Tensor  # (H, n, m), 0 where hidden
    share: torch.Tensor  # (H, n, m), of each in the softmax
    lse: torch.Tensor  # (H, n)
    out: torch.Tensor  # (H, n, D_v)
    sum_roundoff: float  # w (sqrt(keys) + ...) of the module's formula
    roundoff: float  # u more


class Reference:
    """The formulas in float64, for this rank's queries of one layer with (H_q,) `sinks`, whose results have `dtype`.
    Every rank of the group calls it."""

    def __init__(self, plan: RankPlan, options: ScoreOptions, sinks: torch.Tensor | None, dtype: torch.dtype):
        self._plan, self._options, self._sinks, self._dtype = plan, options, sinks, dtype
        self._starts = [0, *itertools.accumulate(plan.plan.lengths)]

    def heads(self, key: torch.Tensor, value: torch.Tensor, query_heads: int) -> Iterator[Head]:
        """Gathers key (H_kv, T_r, D_k) and value (H_kv, T_r, D_v) of all ranks, head by head."""
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
        """Those of all of this rank's queries (H_q, T_r, D_k) in one head, block by block."""
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
        """(H, n, D_k) for grad_out (H_q, T_r, D_v); adds to the gradients of the keys."""
        _, scale, _, softcap = self._options
        k, grad_out = head.key[block.keys], grad_out[head.queries, block.rows].double()
        product = grad_out * block.out
        ds = block.share * (grad_out @ head.value[block.keys].mT - product.sum(-1, keepdim=True))
        if softcap is not None:
            ds = ds * (1 - (block.scores / softcap).square())
        error = product.norm(dim=-1)  # of dO . out, by one unit in each of its terms
        spread = torch.hypot(_root_sum(self._normal(ds), k), error * (block.share @ k).norm(dim=-1))
        errors = scale * self._normal(ds), scale * error[..., None] * block.share
        sums.add(block, scale * ds, errors, grad_out, self._normal(block.share))
        grad = scale * ds @ k
        return Expected(head.queries, block.rows, grad, self._limit(block.roundoff, grad, abs(scale) * spread))

    def grads_of_keys(self, head: Head, sums: KeySums) -> tuple[Expected, Expected]:
        """dK (1, T_r, D_k) and dV (1, T_r, D_v) of this rank's tokens, to which all ranks' queries add, each by a
        limit of its own."""
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
        # Below the least normal number the roundoff is no longer relative.
        least = torch.finfo(self._dtype).tiny * expected.shape[-1] ** 0.5
        return _ROUNDINGS * roundoff * (expected.norm(dim=-1) + spread + least)

    def _normal(self, factors: torch.Tensor) -> torch.Tensor:
        """Sizes of factors, none below the least normal number: there fp16 keeps fewer digits."""
        return factors.abs().clamp(min=torch.finfo(self._dtype).tiny)


class KeySums:
    """dK (C, D_k) and dV (C, D_v) of one head for the whole row, from this rank's queries, and what their limits are
    made of: the largest roundoff of a key's blocks (C,), and sums of squares (C,) of the errors in their terms."""

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
        """Adds a block's ds^T q to dK and share^T dO to dV, and to the squares what one unit in every factor
        (H, n, m) adds to them."""
        keys, unit = block.keys, block.roundoff**2
        self.roundoff[keys].clamp_(min=block.roundoff)
        self.key[keys] += _sum_over_rows(ds, block.query)
        self.value[keys] += _sum_over_rows(block.share, grad_out)
        for errors in ds_errors:
            self.key_squares[keys] += unit * _squares_over_rows(errors, block.query)
        self.value_squares[keys] += unit * _squares_over_rows(share_errors, grad_out)


def _sum_over_rows(factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(m, D): the sum of factors (H, n, m) times rows (H, n, D) over heads and rows."""
    return factors.flatten(0, 1).mT @ rows.flatten(0, 1)


def _squares_over_rows(factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(m,): the sum of factors^2 |row|^2, in the same shapes."""
    return factors.flatten(0, 1).square().mT @ rows.square().sum(-1).flatten()


def _root_sum(factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(..., n): the root of the sum of factors^2 |row|^2, for factors (..., n, m) and rows (m, D)."""
    return (factors.square() @ rows.square().sum(-1)).sqrt()


def _units(dtype: torch.dtype) -> tuple[float, float]:
    """Unit roundoff of `dtype`, and of the sums of its products."""
    if dtype == torch.float32:
        return (_MATMUL_ROUNDOFF[torch.get_float32_matmul_precision()],) * 2
    return torch.finfo(dtype).eps / 2, torch.finfo(accumulate_dtype(dtype)).eps / 2
