"""Strategy "search" with a `CostModel`: makes many plans within the caps and picks the one predicted to be fastest.

The best compromise between balance and traffic depends on the links. Where transfers are hidden behind the local pass,
KV costs no time, and the best balanced plan is the fastest. Where they are not, it can be faster to let a rank compute
5% more than to let it wait. So plans are made under several caps, from nearly equal loads to the user's own caps, and
for several goals: little KV on the busiest rank, in total, or between nodes, and few states in hybrid models. The
plans of all other strategies are added if they meet the caps. The fastest plans are then tried with several stages, in
which the KV of each stage travels while the stage before it is computed.
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
"""The caps on attention pairs to try, as fractions of the slack: what the user's cap allows above 1."""

LEAST_SLACK, MOST_SLACK = 0.001, 1.0
"""No cap below 1 + `LEAST_SLACK` is tried unless the user's own is lower: tight caps take long to plan for, and ranks
whose loads differ by a thousandth wait for each other no longer than a kernel takes to start. A slack above
`MOST_SLACK` counts as `MOST_SLACK` when fractions are taken."""

STAGED = 3
"""How many plans are tried with several stages: this many of the fastest with one stage, and this many of the fastest
made for nodes."""

LAUNCH_BOUND = 2048
"""With fewer tokens per rank than this, KV travels in one stage unless the user gives a number of stages. The host
then takes longer to start a layer's operators than a GPU takes to run them, which predicted times leave out, and every
stage needs more of them."""


class Timed(NamedTuple):
    """A plan and its predicted step time."""

    beyond: int  # attention pairs above the cap, on the rank with the most pairs
    seconds: float  # predicted step time
    plan: ShardPlan
    for_nodes: bool  # whether `node_plans` made it


def fastest(caps: Caps, cost_model: CostModel, num_stages: int | None = None) -> ShardPlan:
    """Return the plan with the least predicted step time (`CostModel.step_time`) among those within the caps.

    Its KV travels in `num_stages` stages, by default in the number that is predicted to be fastest, which is one if
    there are fewer than `LAUNCH_BOUND` tokens per rank. It is sent to each node once or directly between ranks,
    whichever is predicted to be faster. If no plan meets the caps, the plans with the fewest pairs on their fullest
    rank are compared. Ties go to the plan found first, and to fewer stages.
    """
    best = sorted(_timed_candidates(caps, cost_model), key=lambda timed: timed[:2])
    staged = [
        timed._replace(seconds=cost_model.step_time(choice).seconds, plan=choice)
        for for_nodes in (False, True)
        for timed in [timed for timed in best if timed.for_nodes == for_nodes][:STAGED]
        for staging in _stagings(timed.plan, num_stages)
        for choice in dict.fromkeys([staging, staging.with_ranks_per_node(None)])
    ]
    return min(staged, key=lambda timed: timed[:2]).plan


def _timed_candidates(caps: Caps, cost_model: CostModel) -> list[Timed]:
    """Return distinct plans within the cap on tokens, with their predicted times in a single stage."""
    ranks_per_node = cost_model.hardware.ranks_per_node
    nodes = None if caps.cp_size % ranks_per_node else ranks_per_node
    found: dict[tuple, Timed] = {}
    for some, for_nodes in _candidates(caps, ranks_per_node, cost_model.state_tokens):
        for slices in some:
            plan = ShardPlan(caps.lengths, caps.cp_size, slices, None, nodes)
            if plan.slices not in found and max(rank_tokens(plan.slices)) <= caps.most_tokens:
                beyond = max(max(rank_pairs(plan.slices)) - caps.most_pairs, 0)
                found[plan.slices] = Timed(beyond, cost_model.step_time(plan).seconds, plan, for_nodes)
    return list(found.values())


def _stagings(plan: ShardPlan, num_stages: int | None) -> list[ShardPlan]:
    """Return the plan in `num_stages` stages or, if that is `None`, in one stage and in several larger numbers.

    With fewer than `LAUNCH_BOUND` tokens per rank it is one stage.
    """
    most = plan.cp_size - 1
    if num_stages is not None:
        return [in_stages(plan, num_stages)]
    if plan.num_tokens < LAUNCH_BOUND * plan.cp_size:
        return [plan]
    stages = sorted({min(stages, most) for stages in (2, 3, 4, 8, most)}) if most > 1 else []
    loads = _offset_loads(plan)
    return [plan, *(plan.with_offset_groups(_grouped(loads, count)) for count in stages)]


def in_stages(plan: ShardPlan, num_stages: int) -> ShardPlan:
    """Return the same plan with its KV exchanged in `num_stages` stages, at most cp_size - 1.

    The stages have consecutive ring offsets, beginning with 1. They are divided such that the busiest rank receives
    about as much in every stage.
    """
    if num_stages <= 1 or plan.cp_size <= 2:
        return plan.with_offset_groups(None)
    return plan.with_offset_groups(_grouped(_offset_loads(plan), num_stages))


def _offset_loads(plan: ShardPlan) -> list[int]:
    """Return the most tokens that any rank receives from each ring offset, beginning with offset 1."""
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


def _candidates(caps: Caps, ranks_per_node: int, state_tokens: float) -> Iterator[tuple[list[Slices], bool]]:
    """Yield a few plans at a time, and whether [`node_plans`] made them."""
    lengths, cp_size, slack = caps.lengths, caps.cp_size, min(caps.max_imbalance - 1, MOST_SLACK)
    tightened = sorted({max(slack * part, min(slack, LEAST_SLACK)) for part in TIGHTENED})
    if caps.max_imbalance - 1 > slack:
        tightened.append(caps.max_imbalance - 1)
    for token_cap in sorted({1.0, caps.max_token_imbalance}):
        for cap in tightened:
            within = caps.with_imbalance(1 + cap, token_cap)
            flat = search(within)
            yield [flat, search(within, minimize_total=True)], False
            if state_tokens:
                yield [search(within, minimize_total=each, state_tokens=state_tokens) for each in (False, True)], False
            yield node_plans(flat, within, ranks_per_node), True
        yield [flashcp(caps.with_imbalance(caps.max_imbalance, token_cap))], False
    zigzags = [per_doc(lengths, cp_size, rotate_ranks) for rotate_ranks in (False, True)]
    yield [*zigzags, per_seq(lengths, cp_size), whole_doc(lengths, cp_size)], False
