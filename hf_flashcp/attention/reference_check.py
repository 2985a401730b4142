"""Debug mode (`FLASHCP_DEBUG=1`) of the attention: a layer's results are held against the formulas in float64.

Every rank gathers the keys and values of the whole row and attends with its own queries to each document in one piece,
without exchange, parts or merging. It compares its output and logsumexp; in backward dQ, and dK and dV, to which all
ranks' queries add. One KV head at a time and queries in blocks: no more than about 2**24 scores exist at a time.

What rounding explains. Let u be the unit roundoff of the tensors' dtype, and w that in which products are summed (that
of fp32, or of fp64 for fp64; in fp32 both are what `torch.get_float32_matmul_precision` allows). A result x of one
token and head may be off, in the 2-norm, by

    16 (u + w (sqrt(keys) + |q| |k| scale)) (|x| + spread)

The spread is what errors of one unit in every term of its sums come to, independent of each other: for out = sum p v
it is the root of sum p^2 |v|^2, for dV of sum p^2 |dO|^2, for dQ and dK of sum ds^2 |k|^2 and of sum ds^2 |q|^2, with
what an error of dO . out adds, which all terms of a query share. A logsumexp may be off by 16 (u + w (...) (1 + |x|)).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..distributed import add_over_ranks, gather_numbers, gather_rows
from ..errors import ConfigurationError, FlashCPError
from ..layout import RankPlan
from ..layout.rank_layout import token_index
from ..layout.stage import Rectangle
from .engine import Engine
from .kernels.base import accumulate_dtype, cut, hidden


DEFAULT_EVERY = 10
_ROUNDINGS = 16
_MOST_SCORES = 2**24
_MATMUL_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}
_NAMES = ("the output", "the logsumexp", "dQ", "dK", "dV")


def layer_to_check(forward: int, layers: int) -> int | None:
    """Which of a model's `layers` is checked in its sharded forward number `forward`, from 0, and in the backward of
    that: one in every `FLASHCP_DEBUG_EVERY`th, each time the next.

    Raises:
        ConfigurationError: the variable is no whole number from 1.
    """
    every = os.environ.get("FLASHCP_DEBUG_EVERY", str(DEFAULT_EVERY))
    if not every.isdecimal() or int(every) == 0:
        raise ConfigurationError(f"FLASHCP_DEBUG_EVERY is {every!r}: it must be a whole number of forwards, from 1.")
    turn, rest = divmod(forward, int(every))
    return turn % layers if rest == 0 else None


class CheckedEngine:
    """An [`Engine`] whose results are compared. Every rank of the group calls it.

    Args:
        engine (`Engine`): what runs.
        plan (`RankPlan`): what it runs under.
        layer (`str`): its name, for errors.
        sinks (`torch.Tensor`, *optional*): (H_q,) of the layer.

    Raises:
        FlashCPError: on every rank, in forward or in backward: what is farthest off on each rank that finds something.
    """

    def __init__(self, engine: Engine, plan: RankPlan, layer: str, sinks: torch.Tensor | None):
        self._engine, self._plan, self._layer = engine, plan, layer
        self._sinks = None if sinks is None else sinks.detach().double()
        self._starts = [0, *itertools.accumulate(plan.plan.lengths)]

    def forward(self, query, key, value, sinks):
        results = out, lse, _ = self._engine.forward(query, key, value, sinks)
        deviations = _Deviations(self._plan, query.dtype)
        for head in self._heads(query, key, value):
            for block in self._blocks(head, query):
                where = head.queries, block.rows
                spread = _root_sum(_normal(block.share, query.dtype), head.value[block.keys])
                limit = _limit(block.roundoff, block.out, spread, query.dtype)
                deviations.compare("the output", out, where, block.out, limit)
                limit = _ROUNDINGS * (block.roundoff + block.sum_roundoff * block.lse.abs())
                deviations.compare("the logsumexp", lse[..., None], where, block.lse[..., None], limit)
        deviations.tell(self._layer, query)
        return results

    def backward(self, grad_out, query, key, value, out, lse, received, keys_need_grad):
        results = self._engine.backward(grad_out, query, key, value, out, lse, received, keys_need_grad)
        deviations = _Deviations(self._plan, query.dtype)
        own = self._plan.layout.token_index.to(query.device)
        for number, head in enumerate(self._heads(query, key, value)):
            sums = _KeySums(head)
            for block in self._blocks(head, query):
                where = head.queries, block.rows
                grad, spread = self._gradients(head, block, grad_out[where].double(), query.dtype, sums)
                deviations.compare("dQ", results[0], where, grad, _limit(block.roundoff, grad, spread, query.dtype))
            if keys_need_grad:
                where = slice(number, number + 1), slice(0, len(own))
                for name, ours, grad, limit in zip(("dK", "dV"), results[1:], *sums.over_ranks(self._plan, key.dtype)):
                    deviations.compare(name, ours, where, grad[None, own], limit[None, own])
        deviations.tell(self._layer, query)
        return results

    def _heads(self, query, key, value) -> Iterator[_Head]:
        plan, groups = self._plan.plan, query.shape[0] // key.shape[0]
        places = [torch.from_numpy(token_index(plan, rank)).to(key.device) for rank in range(plan.cp_size)]
        counts = [len(place) for place in places]
        for number in range(key.shape[0]):
            mine = torch.cat([key[number], value[number]], dim=-1)
            row = mine.new_empty(plan.num_tokens, mine.shape[1])
            for place, part in zip(places, gather_rows(mine, counts, self._plan.group)):
                row[place] = part
            queries = slice(number * groups, (number + 1) * groups)
            yield _Head(queries, *row.double().split([key.shape[2], value.shape[2]], dim=-1))

    def _blocks(self, head: _Head, query: torch.Tensor) -> Iterator[_Block]:
        scale, softcap, window = self._engine.scale, self._engine.softcap, self._engine.layout.window
        unit, sum_unit = _units(query.dtype)
        groups = head.queries.stop - head.queries.start
        for document, start, stop, row in self._plan.layout.slices:
            first = self._starts[document]
            seen = Rectangle(row, row + stop - start, first, first + stop)
            rows = max(1, _MOST_SCORES // (groups * stop))
            rows = min(rows, max(window, 64)) if window else rows
            for q_start, q_stop, k_start, k_stop in cut(seen, rows, True, window):
                q, k = query[head.queries, q_start:q_stop].double(), head.key[k_start:k_stop]
                mask = hidden(q_stop - q_start, k_stop - k_start, window, query.device)
                scores = q @ k.mT * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores.masked_fill(mask, -torch.inf)
                lse = scores.logsumexp(-1)
                if self._sinks is not None:
                    lse = torch.logaddexp(lse, self._sinks[head.queries, None])
                share = (scores - lse[..., None]).exp()
                size = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * abs(scale)
                sum_roundoff = sum_unit * ((k_stop - k_start) ** 0.5 + size)
                yield _Block(
                    slice(q_start, q_stop),
                    slice(k_start, k_stop),
                    q,
                    scores.masked_fill(mask, 0),
                    share,
                    lse,
                    share @ head.value[k_start:k_stop],
                    unit + sum_roundoff,
                    sum_roundoff,
                )

    def _gradients(self, head, block, grad_out, dtype, sums) -> tuple[torch.Tensor, torch.Tensor]:
        """dQ of a block (H, n, D_k) and its spread (H, n); adds to the gradients of the keys."""
        scale, softcap, k = self._engine.scale, self._engine.softcap, head.key[block.keys]
        product = grad_out * block.out
        ds = block.share * (grad_out @ head.value[block.keys].mT - product.sum(-1, keepdim=True))
        if softcap is not None:
            ds = ds * (1 - (block.scores / softcap).square())
        error = product.norm(dim=-1)  # of dO . out, by one unit in each of its terms
        spread = torch.hypot(_root_sum(_normal(ds, dtype), k), error * (block.share @ k).norm(dim=-1))
        sums.add_key_gradients(block, scale * ds, scale * _normal(ds, dtype), scale * error[..., None] * block.share)
        sums.add_value_gradients(block, grad_out, _normal(block.share, dtype))
        return scale * ds @ k, abs(scale) * spread


class _Head(NamedTuple):
    """Keys (C, D_k) and values (C, D_v) of one KV head for the whole row, and the query heads that attend to them."""

    queries: slice
    key: torch.Tensor
    value: torch.Tensor


class _Block(NamedTuple):
    """`rows` n of the local sequence in H query heads against `keys` m of the packed row, all that they see: query
    (H, n, D_k), scores (0 where hidden) and the share of each in the softmax (H, n, m), logsumexp (H, n), output
    (H, n, D_v). `roundoff` is u + w (...) of the module's formula, `sum_roundoff` that without u."""

    rows: slice
    keys: slice
    query: torch.Tensor
    scores: torch.Tensor
    share: torch.Tensor
    lse: torch.Tensor
    out: torch.Tensor
    roundoff: float
    sum_roundoff: float


class _KeySums:
    """dK and dV of one head for the whole row, as this rank's queries give them, and their limits."""

    def __init__(self, head: _Head):
        self._grads = torch.zeros_like(head.key), torch.zeros_like(head.value)
        self._squares = tuple(grad.new_zeros(len(grad)) for grad in self._grads)
        self._roundoff = head.key.new_zeros(len(head.key))

    def add_key_gradients(self, block: _Block, ds: torch.Tensor, *errors: torch.Tensor) -> None:
        self._roundoff[block.keys].clamp_(min=block.roundoff)
        self._add(0, block, ds, block.query, *errors)

    def add_value_gradients(self, block: _Block, grad_out: torch.Tensor, share: torch.Tensor) -> None:
        self._add(1, block, block.share, grad_out, share)

    def _add(self, which: int, block: _Block, factors: torch.Tensor, rows: torch.Tensor, *errors: torch.Tensor):
        rows, squares = rows.flatten(0, 1), rows.square().sum(-1).flatten()
        self._grads[which][block.keys] += factors.flatten(0, 1).mT @ rows
        for error in errors:
            self._squares[which][block.keys] += block.roundoff**2 * (error.flatten(0, 1).square().mT @ squares)

    def over_ranks(self, plan: RankPlan, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """dK (C, D_k) and dV (C, D_v), and by how much each row may be off (C,): each rank's part by its own limit."""
        limits = [
            _limit(self._roundoff, grad, 0.0, dtype) + _ROUNDINGS * squares.sqrt()
            for grad, squares in zip(self._grads, self._squares)
        ]
        total = torch.cat([*self._grads, torch.stack(limits, -1)], dim=-1)
        widths = [*(grad.shape[1] for grad in self._grads), 1, 1]
        *grads, key_limit, value_limit = add_over_ranks(total, plan.group).split(widths, dim=-1)
        return grads, [key_limit[:, 0], value_limit[:, 0]]


class _Deviations:
    """What is farthest beyond its limit on this rank."""

    def __init__(self, plan: RankPlan, dtype: torch.dtype):
        self._plan, self._overflows = plan, dtype == torch.float16
        self._worst = [0.0] * 7  # excess, number of the name, document, position, head, error, limit

    def compare(self, name, ours, where: tuple[slice, slice], expected, limit) -> None:
        """Rows `where` (heads, rows of the local sequence) of `ours` against `expected` (H, n, D), by `limit` (H, n).
        Where data are not finite there is nothing to compare. In fp16 kernels overflow on the way to what float64
        finds finite, on any device; loss scaling sees that."""
        found = ours[where].double()
        error = (found - expected).norm(dim=-1)
        known = expected.isfinite().all(-1) & limit.isfinite()
        if self._overflows:
            known &= found.isfinite().all(-1)
        excess = torch.where(known & ~(error <= limit), error / limit, 0).nan_to_num(nan=math.inf)
        if excess.numel() == 0 or float(excess.max()) <= self._worst[0]:
            return
        head, row = divmod(int(excess.argmax()), excess.shape[1])
        document, position = self._place(where[1].start + row)
        self._worst = [
            float(excess[head, row]),
            float(_NAMES.index(name)),
            *(float(number) for number in (document, position, where[0].start + head)),
            float(error[head, row]),
            float(limit[head, row]),
        ]

    def _place(self, row: int) -> tuple[int, int]:
        document, start, _, first = max(
            (piece for piece in self._plan.layout.slices if piece.row <= row), key=lambda piece: piece.row
        )
        return document, start + row - first

    def tell(self, layer: str, tensor: torch.Tensor) -> None:
        """Hears of all ranks; raises the same error on each if there is any deviation."""
        group = self._plan.group
        ranks = [0] if group is None else torch.distributed.get_process_group_ranks(group)
        problems = [
            f"{_NAMES[int(name)]} of document {int(document)} at token {int(position)}, head {int(head)}, on rank "
            f"{rank} is off by {error:.2g}, where rounding explains {limit:.2g}"
            for rank, (excess, name, document, position, head, error, limit) in zip(
                ranks, gather_numbers(self._worst, tensor.device, group)
            )
            if excess > 0
        ]
        if problems:
            raise FlashCPError(
                f"Attention of {layer} in {str(tensor.dtype).removeprefix('torch.')} is not what float64 gives: "
                f"{'; '.join(problems)}. A kernel, the exchange or what merges them is wrong there, or memory was "
                "overwritten: see docs/troubleshooting.md, what debug mode found."
            )


def _units(dtype: torch.dtype) -> tuple[float, float]:
    """Unit roundoff of `dtype`, and of the sums of its products."""
    if dtype == torch.float32:
        return (_MATMUL_ROUNDOFF[torch.get_float32_matmul_precision()],) * 2
    return torch.finfo(dtype).eps / 2, torch.finfo(accumulate_dtype(dtype)).eps / 2


def _limit(roundoff, expected: torch.Tensor, spread, dtype: torch.dtype) -> torch.Tensor:
    least = torch.finfo(dtype).tiny * expected.shape[-1] ** 0.5  # below it the roundoff is no longer relative
    return _ROUNDINGS * roundoff * (expected.norm(dim=-1) + spread + least)


def _normal(factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sizes of factors as far as their relative roundoff goes: fp16 keeps fewer digits of what is below its `tiny`."""
    return factors.abs().clamp(min=torch.finfo(dtype).tiny)


def _root_sum(factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(..., n): the root of sum factors^2 |row|^2, for factors (..., n, m) and rows (m, D)."""
    return (factors.square() @ rows.square().sum(-1)).sqrt()
