"""Strategy "search" with a `CostModel`: of many plans within the caps, the one with the least predicted step time.

How much balance is worth how much traffic depends on the link: where KV is hidden behind the local pass it is free,
and the best plan is the best balanced one; where it is not, a rank may rather compute 5% more than wait. So plans are
made under several caps, from nearly even to the user's own, with the busiest rank's KV or all of it kept low, and
judged by their predicted time, next to those of every other strategy that keeps within the caps.
"""

from __future__ import annotations

from collections.abc import Iterator

from .algorithm1 import flashcp
from .cost import CostModel
from .lower_bound import Caps
from .plan import ShardPlan
from .search import search
from .sharding import Lengths, Slices, per_doc, per_seq, whole_doc


TIGHTENED = (0.02, 0.1, 0.3, 0.6, 1.0)
"""Caps that are tried on attention pairs: 1 plus so much of what the user allows above 1. The tightest are the most
expensive to plan, and ranks that differ by a thousandth wait for each other no longer than for a kernel's start."""

LEAST_SLACK, MOST_SLACK = 0.001, 1.0


def fastest(
    lengths: Lengths, cp_size: int, cost_model: CostModel, max_imbalance: float, max_token_imbalance: float
) -> Slices:
    """Slices of the plan with the least predicted step time (`CostModel.step_time`) among those within the caps; the
    first of several. Where no plan meets the caps, of the plans with the least pairs on a rank."""
    caps = Caps(lengths, cp_size, max_imbalance, max_token_imbalance)
    best, best_key, seen = None, None, set()
    for slices in _candidates(lengths, cp_size, max_imbalance, max_token_imbalance):
        plan = ShardPlan(lengths, cp_size, slices)
        if plan.slices in seen:
            continue
        seen.add(plan.slices)
        tokens = [sum(stop - start for _, start, stop in held) for held in plan.slices]
        pairs = [sum((stop - start) * (stop + start + 1) // 2 for _, start, stop in held) for held in plan.slices]
        if max(tokens) > caps.most_tokens:
            continue
        beyond = max(max(pairs) - caps.most_pairs, 0)
        if best_key is not None and beyond > best_key[0]:
            continue
        key = (beyond, cost_model.step_time(plan).seconds)
        if best_key is None or key < best_key:
            best, best_key = slices, key
    assert best is not None, "search is within the cap on tokens"
    return best


def _candidates(lengths: Lengths, cp_size: int, max_imbalance: float, max_token_imbalance: float) -> Iterator[Slices]:
    slack = min(max_imbalance - 1, MOST_SLACK)
    caps = sorted({max(slack * part, min(slack, LEAST_SLACK)) for part in TIGHTENED})
    token_caps = sorted({1.0, max_token_imbalance})
    for token_cap in token_caps:
        for cap in [*caps, *([max_imbalance - 1] if max_imbalance - 1 > slack else [])]:
            for minimize_total in (False, True):
                yield search(
                    lengths,
                    cp_size,
                    max_imbalance=1 + cap,
                    max_token_imbalance=token_cap,
                    minimize_total=minimize_total,
                )
        yield flashcp(lengths, cp_size, max_imbalance, token_cap)
    yield per_doc(lengths, cp_size)
    yield per_doc(lengths, cp_size, rotate_ranks=True)
    yield per_seq(lengths, cp_size)
    yield whole_doc(lengths, cp_size)
