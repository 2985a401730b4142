"""Explains predicted steps: how close a plan is to the lower bound, what limits it, and what other choices give."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..errors import UnmetCapWarning
from ..plan.shard_plan import ShardPlan
from ..plan.topology import Topology
from ..predict.cost_model import CostModel
from ..predict.hardware_profile import Link
from .caps import Caps
from .settings import STRATEGIES, PlanSettings
from .strategies import plan_with
from .time_bound import step_time_bound


IMBALANCES = (1.01, 1.05, 1.1, 1.2)
"""The caps on attention pairs that are compared."""

TOKEN_IMBALANCES = (1.0, 1.05)
"""The caps on tokens that are compared."""

STAGES = (1, 2, 4)
"""The numbers of stages that are compared."""

_ROUNDING = 1e-12  # waits below this part of a step are rounding errors


class Limits(NamedTuple):
    """Seconds that add up to a step: means over ranks, and what the slowest rank takes longer.

    `inside` and `between` are waits for links inside nodes and between nodes, `states` are waits for other ranks'
    states in recurrent layers. A wait only counts as far as it delays the rank beyond the mean work.
    """

    linear: float
    attention: float
    scan: float
    copies: float
    uneven: float
    inside: float
    between: float
    states: float


class Choice(NamedTuple):
    """A plan that differs from another one in a single setting."""

    group: str  # the setting, or "" for the plan itself
    value: Any  # of the setting
    cp_size: int
    seconds: float
    over_bound: float | None  # relative to the lower bound under its own caps, `None` beyond them
    kv_received: int  # tokens of the busiest rank, in the forward of a layer with full attention
    gpu_seconds_per_token: float


def seconds_bound(plan: ShardPlan, cost_model: CostModel, *caps: float) -> float | None:
    """Return the least step time of any plan within the caps, or `None` if this plan is beyond them.

    `caps` are `max_imbalance` and `max_token_imbalance`, by default those of [`plan_documents`].
    """
    of_batch = Caps(plan.lengths, plan.cp_size, *caps)
    tokens = plan.columns.sums(plan.columns.tokens)
    equal = of_batch.token_room or int(tokens.max() - tokens.min()) <= 1
    if not equal or not of_batch.allow(plan.slices):
        return None
    return step_time_bound(plan.lengths, plan.cp_size, cost_model, *caps).seconds


def step_limits(plan: ShardPlan, cost_model: CostModel) -> Limits:
    """Return what a plan's predicted step consists of."""
    at_once = Link(math.inf, 0.0)
    within_only = dataclasses.replace(cost_model.hardware, inter_node=at_once)
    profiles = cost_model.hardware, within_only, dataclasses.replace(within_only, intra_node=at_once)
    time, *others = (dataclasses.replace(cost_model, hardware=each).step_time(plan) for each in profiles)
    rank = int(time.of_ranks.argmax())
    work = time.of_ranks - time.exposed
    waits = np.array([each.exposed[rank] for each in (time, *others)])
    waits = np.where(waits > _ROUNDING * time.seconds, waits, 0.0)
    lost, waited = float(time.seconds - work.mean()), float(waits[0])
    waiting = min(waited, lost)
    parts = -np.diff(np.append(waits, 0.0)) * (waiting / waited if waited else 0.0)
    between, inside, states = np.maximum(parts, 0.0).tolist()
    linear, attention, scan, copies = (
        float(part.mean()) for part in (time.linear, time.attention, time.scan, time.copies)
    )
    return Limits(linear, attention, scan, copies, lost - waiting, inside, between, states)


def other_choices(plan: ShardPlan, settings: PlanSettings, cost_model: CostModel) -> list[Choice]:
    """Return what a plan gives, and what plans give that are made with one other setting.

    Args:
        plan (`ShardPlan`): the plan, made with `settings`.
        settings (`PlanSettings`): its settings. Their topology is that of `cost_model`.
        cost_model (`CostModel`): predicts the steps, and plans of "search" are made with it.
    """
    found = [_choice("", None, plan, settings, cost_model)]
    for group, value, changed in _changes(plan, settings, cost_model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnmetCapWarning)
            other = plan_with(changed, plan.lengths)
        found.append(_choice(group, value, other, changed, cost_model))
    return found


def _changes(
    plan: ShardPlan, settings: PlanSettings, cost_model: CostModel
) -> Iterator[tuple[str, Any, PlanSettings]]:
    change = functools.partial(_changed, settings, cost_model)
    if settings.strategy in ("flashcp", "search"):
        for name, caps in (("max_imbalance", IMBALANCES), ("max_token_imbalance", TOKEN_IMBALANCES)):
            yield from ((name, cap, change(**{name: cap})) for cap in caps if cap != getattr(settings, name))
    if max(plan.kv_moved()[0]):
        used = len(plan.offset_groups or [()])
        for stages in STAGES:
            if stages != used and stages < max(plan.cp_size, 2):
                yield "num_stages", stages, change(num_stages=stages)
    for strategy in STRATEGIES:
        if strategy != settings.strategy:
            yield "strategy", strategy, change(strategy=strategy)
    if settings.cost_model is not None:
        yield "hardware", None, change(cost_model=None, state_tokens=cost_model.state_tokens)
    half, odd = divmod(plan.cp_size, 2)
    if not odd:
        yield "cp_size", half, change(cp_size=half)
    if 2 * plan.cp_size <= plan.num_tokens:
        yield "cp_size", 2 * plan.cp_size, change(cp_size=2 * plan.cp_size)


def _changed(settings: PlanSettings, timing: CostModel, /, **changes: Any) -> PlanSettings:
    """Return settings with changes, with what goes with their strategy and their number of ranks."""
    strategy = changes.get("strategy", settings.strategy)
    cp_size = changes.get("cp_size", settings.cp_size)
    if strategy != settings.strategy:
        changes |= {"cost_model": timing if strategy == "search" else None, "state_tokens": 0.0}
        changes["rotate_ranks"] = False
    ranks_per_node = timing.hardware.ranks_per_node
    several = 1 < ranks_per_node < cp_size and cp_size % ranks_per_node == 0
    return dataclasses.replace(settings, **changes, topology=Topology(ranks_per_node) if several else None)


def _choice(group: str, value: Any, plan: ShardPlan, settings: PlanSettings, cost_model: CostModel) -> Choice:
    seconds = cost_model.step_time(plan).seconds
    bound = seconds_bound(plan, cost_model, settings.max_imbalance, settings.max_token_imbalance)
    received, per_token = max(plan.kv_moved()[0]), seconds * plan.cp_size / plan.num_tokens
    over_bound = None if bound is None else seconds / bound
    return Choice(group, value, plan.cp_size, seconds, over_bound, received, per_token)
