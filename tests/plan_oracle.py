"""Optimal plans of small batches by integer programming (HiGHS through scipy).

Strategies and the lower bound are tested against them. No planning code is shared with the library.

A document i is divided into blocks b of `block` tokens, of which a few hundred are already many. The variables are,
for each block and each rank r:

- x_ibr, binary: r holds the block;
- u_ibr, continuous: r needs or holds the block, u_ibr >= x_ibr and u_ibr >= u_i,b+1,r;
- s_ibr, continuous, only if sent KV is part of the objective: the number of ranks to which r sends the block,
  s_ibr >= sum over the others of u - (N - 1) (1 - x).

With t tokens in a block, a rank receives sum t (u - x) tokens and sends sum t s.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from hf_flashcp.planning import ShardPlan


OBJECTIVES = ("total", "received", "sent", "bottleneck")
"""What to minimize: total KV, or the largest received, sent, or max(received, sent) of any rank."""


@dataclass
class Optimum:
    """The best plan that the solver found.

    Attributes:
        value (`int`): tokens of KV, counted from the plan.
        plan (`ShardPlan`): a valid plan within the caps.
        proven (`bool`): the solver proved that no plan with cuts at multiples of `block` has a lower value.
        least (`float`): proven lower bound for all such plans; equals `value` if `proven`.
    """

    value: int
    plan: ShardPlan
    proven: bool
    least: float


def best_plan(
    lengths,
    cp_size: int,
    objective: str = "total",
    *,
    block: int = 1,
    max_imbalance: float = 1.05,
    max_token_imbalance: float = 1.0,
    seconds: float = 60.0,
) -> Optimum | None:
    """Find the plan with the least `objective` among all plans whose cuts are multiples of `block` tokens.

    Args:
        lengths: tokens in each document, multiples of `block`.
        max_imbalance: cap on the attention pairs of a rank, as a multiple of the mean.
        max_token_imbalance: cap on the tokens of a rank, as a multiple of the mean. If no plan meets it, tokens must
            be equal within one block.
        seconds: time limit of the solver, after which its best plan so far is returned.

    Returns:
        `Optimum`, or `None` if no plan was found, because there is none or because the time was too short.
    """
    if objective not in OBJECTIVES or any(length % block for length in lengths):
        raise ValueError(f"objective {objective!r}, lengths {lengths}, block {block}")
    model = _Model(lengths, cp_size, block)
    model.partition()
    model.caps(max_imbalance, max_token_imbalance)
    result = milp(
        model.objective(objective),
        integrality=model.integrality,
        bounds=Bounds(0, model.upper),
        constraints=model.constraint(),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    plan = model.plan(result.x)
    return Optimum(objective_of(plan, objective), plan, result.status == 0, result.mip_dual_bound)


def objective_of(plan: ShardPlan, objective: str) -> int:
    """Return the value of the objective that `best_plan` minimizes, for any plan."""
    report = plan.report()
    return {
        "total": report["kv_total"],
        "received": max(report["kv_received"]),
        "sent": max(report["kv_sent"]),
        "bottleneck": max(report["kv_received"] + report["kv_sent"]),
    }[objective]


class _Model:
    """Rows of the program, collected as `(coefficients by column, lower, upper)`."""

    def __init__(self, lengths, cp_size: int, block: int):
        self.lengths, self.cp_size, self.block = list(lengths), cp_size, block
        self.blocks = [
            (document, start) for document, length in enumerate(lengths) for start in range(0, length, block)
        ]
        self.index = {key: number for number, key in enumerate(self.blocks)}
        count = len(self.blocks) * cp_size
        self.x = np.arange(count).reshape(-1, cp_size)
        self.u = self.x + count
        self.upper = [1.0] * (2 * count)
        self.integrality = [1] * count + [0] * count
        self.rows: list[tuple[dict[int, float], float, float]] = []
        # Ranks are interchangeable. So, counted from the end of the longest document, block k is on rank <= k.
        order = sorted(range(len(self.blocks)), key=lambda number: (-lengths[self.blocks[number][0]], -number))
        for place, number in enumerate(order[:cp_size]):
            for rank in range(place + 1, cp_size):
                self.upper[self.x[number, rank]] = 0.0

    def column(self, upper: float = math.inf) -> int:
        self.upper.append(upper)
        self.integrality.append(0)
        return len(self.upper) - 1

    def at_least(self, coefficients: dict[int, float], lower: float, upper: float = math.inf) -> None:
        self.rows.append((coefficients, lower, upper))

    def partition(self) -> None:
        for number, (document, start) in enumerate(self.blocks):
            self.at_least({column: 1.0 for column in self.x[number]}, 1, 1)
            following = self.index.get((document, start + self.block))
            for rank in range(self.cp_size):
                self.at_least({self.u[number, rank]: 1.0, self.x[number, rank]: -1.0}, 0)
                if following is not None:
                    self.at_least({self.u[number, rank]: 1.0, self.u[following, rank]: -1.0}, 0)

    def caps(self, max_imbalance: float, max_token_imbalance: float) -> None:
        """Add the caps, in units of blocks and of the mean pairs, so that the solver's tolerances do not matter."""
        count, cp_size = len(self.blocks), self.cp_size
        most = min(math.floor(max_token_imbalance * count / cp_size + 1e-9), count)
        least = 1
        if most <= count // cp_size:
            least, most = count // cp_size, -(-count // cp_size)
        pairs = [sum(range(start + 1, start + self.block + 1)) for _, start in self.blocks]
        mean = sum(pairs) / cp_size
        for rank in range(cp_size):
            column = self.x[:, rank]
            self.at_least(dict.fromkeys(column, 1.0), least, most)
            if max_imbalance < cp_size:
                held = {place: value / mean for place, value in zip(column, pairs)}
                self.at_least(held, 0, max_imbalance)

    def objective(self, name: str) -> np.ndarray:
        """Return the costs of all columns, in blocks."""
        if name == "total":
            largest = None
        else:
            largest = self.column()
        if name in ("received", "bottleneck"):
            for rank in range(self.cp_size):
                held = {largest: 1.0}
                held |= dict.fromkeys(self.u[:, rank], -1.0)
                held |= dict.fromkeys(self.x[:, rank], 1.0)
                self.at_least(held, 0)
        if name in ("sent", "bottleneck"):
            for rank in range(self.cp_size):
                self.at_least({largest: 1.0} | dict.fromkeys(self._sent(rank), -1.0), 0)
        costs = np.zeros(len(self.upper))
        if largest is None:
            costs[self.u.ravel()], costs[self.x.ravel()] = 1.0, -1.0
        else:
            costs[largest] = 1.0
        return costs

    def _sent(self, rank: int) -> list[int]:
        others = self.cp_size - 1
        columns = []
        for number in range(len(self.blocks)):
            columns.append(self.column(others))
            row = {columns[-1]: 1.0, self.x[number, rank]: -float(others)}
            row |= {self.u[number, other]: -1.0 for other in range(self.cp_size) if other != rank}
            self.at_least(row, -others)
        return columns

    def constraint(self) -> LinearConstraint:
        numbers = [number for number, (row, *_) in enumerate(self.rows) for _ in row]
        columns = [column for row, *_ in self.rows for column in row]
        values = [value for row, *_ in self.rows for value in row.values()]
        matrix = sparse.csr_array((values, (numbers, columns)), shape=(len(self.rows), len(self.upper)))
        return LinearConstraint(matrix, [row[1] for row in self.rows], [row[2] for row in self.rows])

    def plan(self, solution: np.ndarray) -> ShardPlan:
        slices: list[list[tuple[int, int, int]]] = [[] for _ in range(self.cp_size)]
        for number, rank in enumerate(solution[self.x].argmax(axis=1)):
            document, start = self.blocks[number]
            slices[rank].append((document, start, start + self.block))
        return ShardPlan(self.lengths, self.cp_size, slices).validate()


@functools.cache
def _assignments(length: int, cp_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and pairs of all ranks for all assignments of one document's tokens, and the least KV of each.

    Equal rows are joined.
    """
    least: dict[tuple[int, ...], int] = {}
    for ranks in itertools.product(range(cp_size), repeat=length):
        tokens, pairs, ends = ([0] * cp_size for _ in range(3))
        for position, rank in enumerate(ranks, 1):
            tokens[rank] += 1
            pairs[rank] += position
            ends[rank] = position
        held = (*tokens, *pairs)
        least[held] = min(least.get(held, math.inf), sum(ends) - length)
    return np.array(list(least)), np.array(list(least.values()))


def least_total(lengths, cp_size: int, most_pairs: int, least_tokens: int, most_tokens: int) -> int | None:
    """Find the least total KV of a few very short documents by trying all assignments of their tokens.

    Documents are added one by one, and of equal loads of the ranks only the cheapest is kept. This takes milliseconds
    where `best_plan` takes a second. Returns `None` if no plan is within the caps.
    """
    loads, costs = np.zeros((1, 2 * cp_size), np.int64), np.zeros(1, np.int64)
    for length in sorted(lengths, reverse=True):
        added, kv = _assignments(length, cp_size)
        loads = (loads[:, None] + added).reshape(-1, 2 * cp_size)
        costs = (costs[:, None] + kv).ravel()
        within = (loads[:, :cp_size] <= most_tokens).all(1) & (loads[:, cp_size:] <= most_pairs).all(1)
        loads, costs = loads[within], costs[within]
        order = np.lexsort((costs, *loads.T))
        loads, costs = loads[order], costs[order]
        first = np.ones(len(loads), bool)
        first[1:] = (loads[1:] != loads[:-1]).any(1)
        loads, costs = loads[first], costs[first]
    costs = costs[(loads[:, :cp_size] >= least_tokens).all(1)]
    return int(costs.min()) if len(costs) else None
