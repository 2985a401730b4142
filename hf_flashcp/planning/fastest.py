"""Strategy "search" with a `CostModel`: of many plans within the caps, the one with the least predicted step time.

How much balance is worth how much traffic depends on the link: where KV is hidden behind the local pass it is free,
and the best plan is the best balanced one; where it is not, a rank may rather compute 5% more than wait. So plans are
made under several caps, from nearly even to the user's own, with the busiest rank's KV, all of it or what travels
between nodes kept low, and judged by their predicted time, next to those of every other strategy that keeps within
the caps. The best of them are then tried with their KV travelling in more stages than one, each hidden behind the work
on the stage before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..plan.shard_plan import ShardPlan
from ..plan.slices import Slices, rank_pairs, rank_tokens
from ..predict.cost_model import CostModel
from .algorithm1 import flashcp
from .caps import Caps
from .search.nodes import node_plans
from .search.search import search
from .sharding import per_doc, per_seq, whole_doc


TIGHTENED = (0.02, 0.1, 0.3, 0.6, 1.0)
"""Caps that are tried on attention pairs: 1 plus so much of what the user allows above 1. The tightest are the most
expensive to plan, and ranks that differ by a thousandth wait for each other no longer than for a kernel's start."""

LEAST_SLACK, MOST_SLACK = 0.001, 1.0
"""No cap is tightened below 1 plus the first; parts are taken of what is allowed above 1 up to the second."""

STAGED = 3
"""How many plans are tried with more stages: those of the least time with one, and as many that spare links between
nodes."""


class Timed(NamedTuple):
    """A plan, its attention pairs above the cap, its predicted step time, and whether it is made for nodes."""

    beyond: int
    seconds: float
    plan: ShardPlan
    for_nodes: bool


def fastest(caps: Caps, cost_model: CostModel, num_stages: int | None = None) -> ShardPlan:
    """The plan with the least predicted step time (`CostModel.step_time`) among those within the caps, the first of
    several; its KV travels in `num_stages` stages, or in as many as are predicted to be best, and crosses to each node
    once or directly. Where no plan meets the caps, of the plans with the least pairs on a rank."""
    best = sorted(_timed_candidates(caps, cost_model), key=lambda timed: timed[:2])
    # Ties go to the first, and to fewer stages.
    staged = [
        timed._replace(seconds=cost_model.step_time(choice).seconds, plan=choice)
        for for_nodes in (False, True)
        for timed in [timed for timed in best if timed.for_nodes == for_nodes][:STAGED]
        for staging in _stagings(timed.plan, num_stages)
        for choice in dict.fromkeys([staging, staging.with_ranks_per_node(None)])
    ]
    return min(staged, key=lambda timed: timed[:2]).plan


def _timed_candidates(caps: Caps, cost_model: CostModel) -> list[Timed]:
    """Different plans within the cap on tokens."""
    ranks_per_node = cost_model.hardware.ranks_per_node
    nodes = None if caps.cp_size % ranks_per_node else ranks_per_node
    found: dict[tuple, Timed] = {}
    for some, for_nodes in _candidates(caps, ranks_per_node):
        for slices in some:
            plan = ShardPlan(caps.lengths, caps.cp_size, slices, None, nodes)
            if plan.slices not in found and max(rank_tokens(plan.slices)) <= caps.most_tokens:
                beyond = max(max(rank_pairs(plan.slices)) - caps.most_pairs, 0)
                found[plan.slices] = Timed(beyond, cost_model.step_time(plan).seconds, plan, for_nodes)
    return list(found.values())


def _stagings(plan: ShardPlan, num_stages: int | None) -> list[ShardPlan]:
    """The plan in `num_stages` stages, or in one and several numbers of them."""
    most = plan.cp_size - 1
    if num_stages is not None:
        return [in_stages(plan, num_stages)]
    stages = sorted({min(stages, most) for stages in (2, 3, 4, 8, most)}) if most > 1 else []
    loads = _offset_loads(plan)
    return [plan, *(plan.with_offset_groups(_grouped(loads, count)) for count in stages)]


def in_stages(plan: ShardPlan, num_stages: int) -> ShardPlan:
    """The same plan with its ring offsets, the nearest first, in so many groups (at most cp_size - 1) between which
    what the busiest ranks receive is shared as evenly as it goes."""
    if num_stages <= 1 or plan.cp_size <= 2:
        return plan.with_offset_groups(None)
    return plan.with_offset_groups(_grouped(_offset_loads(plan), num_stages))


def _offset_loads(plan: ShardPlan) -> list[int]:
    """What the busiest rank receives from each ring offset, 1 first, in tokens."""
    traffic, cp_size = plan.kv_traffic().tolist(), plan.cp_size
    return [max(traffic[rank][(rank + offset) % cp_size] for rank in range(cp_size)) for offset in range(1, cp_size)]


def _grouped(loads: list[int], num_stages: int) -> list[list[int]]:
    groups: list[list[int]] = []
    left, group, held = sum(loads), [], 0
    for offset, load in enumerate(loads, start=1):
        group.append(offset)
        held += load
        stages_left, offsets_left = num_stages - len(groups), len(loads) - offset
        if stages_left > 1 and (held * stages_left >= left or offsets_left < stages_left):
            groups.append(group)
            left, group, held = left - held, [], 0
    if group:
        groups.append(group)
    return groups


def _candidates(caps: Caps, ranks_per_node: int) -> Iterator[tuple[list[Slices], bool]]:
    """Plans, a few at a time, and whether they are of [`node_plans`]."""
    lengths, cp_size, slack = caps.lengths, caps.cp_size, min(caps.max_imbalance - 1, MOST_SLACK)
    tightened = sorted({max(slack * part, min(slack, LEAST_SLACK)) for part in TIGHTENED})
    if caps.max_imbalance - 1 > slack:
        tightened.append(caps.max_imbalance - 1)
    for token_cap in sorted({1.0, caps.max_token_imbalance}):
        for cap in tightened:
            within = caps.with_imbalance(1 + cap, token_cap)
            flat = search(within)
            yield [flat, search(within, minimize_total=True)], False
            yield node_plans(flat, within, ranks_per_node), True
        yield [flashcp(caps.with_imbalance(caps.max_imbalance, token_cap))], False
    zigzags = [per_doc(lengths, cp_size, rotate_ranks) for rotate_ranks in (False, True)]
    yield [*zigzags, per_seq(lengths, cp_size), whole_doc(lengths, cp_size)], False
