"""Strategy "search" with a `CostModel`: makes a few plans within the caps and picks the one predicted to be fastest.

The best compromise between balance and traffic depends on the links. Where transfers are hidden behind the local pass,
KV costs no time, and the best balanced plan is the fastest. So the first plans are built under caps that are nearly
equal to the mean. If their ranks wait for KV, further plans are built that move less: under looser caps up to the
user's own, and with a target for the KV of each rank. On several nodes, ranks are then regrouped such that those that
share documents share a node.

All plans are priced together (`JoinedPlans`), which takes hardly longer than pricing one. Plans of other strategies
are added unless they are certain to be slower. The fastest plans are then tried with several stages, in which the KV
of each stage travels while the stage before it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..plan.link_traffic import rank_traffic
from ..plan.shard_plan import ShardPlan
from ..plan.slice_table import SliceColumns
from ..plan.slices import Slices
from ..predict.cost_model import CostModel
from ..predict.joined_plans import JoinedPlans
from .algorithm1 import flashcp
from .caps import Caps
from .rivals import rivals
from .search.build import Construction
from .search.grouping import group_ranks
from .search.nodes import node_plans
from .search.search import search
from .search.settings import SETTINGS, Settings
from .sharding import give_empty_ranks_a_token
from .stagings import offset_groups, offset_loads


class Try(NamedTuple):
    """One construction: its settings, and what its cap on attention pairs allows above the mean."""

    settings: Settings
    slack: float


class Effort(NamedTuple):
    """The constructions to try for batches in which documents + 4 x ranks is at most `most_size`."""

    most_size: float
    tight: tuple[Try, ...]  # all of these are built
    looser: tuple[Try, ...]  # the first of these that leads to a plan is built if none of the above does
    lighter: tuple[Try, ...]  # all of these are built if ranks wait for KV
    targets: int  # plans that are built beside each of the first two plans then, with a target for the busiest rank
    packs: int  # times that a construction packs whole documents before it gives up
    staged: int  # how many of the fastest plans are tried with several stages
    with_flashcp: bool = False  # whether a plan of "flashcp" is always tried, because that takes little time
    stages: tuple[int, ...] = (2, 3, 4, 8)  # the numbers of stages that are tried
    lightest: bool = True  # whether the plans with the least KV are tried if ranks wait long
    with_search: bool = False  # whether the plan that is made without a cost model is always tried


_TIGHT = (Try(SETTINGS[0], 0.005), Try(SETTINGS[4], 0.01), Try(SETTINGS[1], 0.02), Try(SETTINGS[7], 0.005))
_LOOSER = (Try(SETTINGS[0], 0.02), Try(SETTINGS[0], 0.05), Try(SETTINGS[1], math.inf))
_LIGHTER = (Try(SETTINGS[0], math.inf), Try(SETTINGS[1], math.inf))

_LARGE: dict[str, Any] = {
    "tight": (Try(SETTINGS[0], 0.02),),
    "looser": (Try(SETTINGS[0], 0.05), Try(SETTINGS[0], math.inf)),
    "lighter": (),
    "targets": 0,
    "staged": 1,
    "lightest": False,
}

EFFORTS = (
    Effort(90, _TIGHT, _LOOSER, _LIGHTER, targets=2, packs=8, staged=2, with_flashcp=True, with_search=True),
    Effort(250, _TIGHT, _LOOSER, _LIGHTER, targets=2, packs=8, staged=2, with_flashcp=True),
    Effort(700, _TIGHT[:3], _LOOSER, _LIGHTER, targets=2, packs=3, staged=2),
    Effort(4000, (_TIGHT[0], Try(SETTINGS[0], 0.02)), _LOOSER[1:], (), targets=0, packs=2, staged=1, stages=(2, 4)),
    Effort(10_000, **_LARGE, packs=4, stages=(3,)),
    Effort(math.inf, **_LARGE, packs=20, stages=()),
)
"""Efforts, for the smallest batches first."""

TARGETS = (0.85, 0.7)
"""Targets for the KV of a rank, relative to the busiest rank of the plan that is built without a target."""

MOST_SLACK = 1.0
"""A cap that allows more than this above the mean counts as this."""

WAITS = 0.002
"""Ranks wait for KV if waiting takes more than this part of the step."""

WAITS_LONG = 0.12
"""If waiting takes more than this part of the step, the plans with the least KV are also tried. They take longer to
find, which the step makes up for."""

LAUNCH_BOUND = 2048
"""With fewer tokens per rank than this, KV travels in one stage unless the user gives a number of stages. The host
then takes longer to start a layer's operators than a GPU takes to run them, which predicted times leave out, and every
stage needs more of them."""


class Timed(NamedTuple):
    """A plan and its predicted step time."""

    beyond: int  # attention pairs above the cap, on the rank with the most pairs
    seconds: float  # predicted step time
    plan: ShardPlan
    exposed: float  # seconds that the slowest rank waits


def fastest(caps: Caps, cost_model: CostModel, num_stages: int | None = None) -> ShardPlan:
    """Return the plan with the least predicted step time (`CostModel.step_time`) among those within the caps.

    Its KV travels in `num_stages` stages, by default in the number that is predicted to be fastest, which is one if
    there are fewer than `LAUNCH_BOUND` tokens per rank. It is sent to each node once or directly between ranks,
    whichever is predicted to be faster. If no plan meets the caps, the plans with the fewest pairs on their fullest
    rank are compared. Ties go to the plan found first, and to fewer stages.
    """
    contest = Contest(caps, cost_model)
    contest.enter([*contest.tight_plans(), *([flashcp(caps)] if contest.effort.with_flashcp else [])])
    if not contest.found or contest.best.beyond:
        contest.enter([search(caps)])
    if contest.best.exposed > WAITS * contest.best.seconds:
        contest.enter(contest.lighter_plans())
    if contest.best.exposed > WAITS_LONG * contest.best.seconds:
        contest.enter(contest.lightest_plans(), as_built=True)
    elif contest.effort.with_search or cost_model.state_tokens:
        contest.enter([search(caps, state_tokens=cost_model.state_tokens)])
    limit = math.inf if contest.best.beyond else contest.best.seconds
    contest.enter(rivals(caps, cost_model, limit, not contest.effort.with_flashcp), regroup=False, as_built=True)
    return contest.staged(num_stages)


class Contest:
    """Collects plans with their predicted times."""

    def __init__(self, caps: Caps, cost_model: CostModel):
        self.caps, self.cost_model = caps, cost_model
        self.found: list[Timed] = []
        self.built: list[tuple[Construction, Slices]] = []
        caps.prepare()
        size = len(caps.lengths) + 4 * caps.cp_size
        self.effort = next(effort for effort in EFFORTS if size <= effort.most_size)
        self.slack = min(caps.max_imbalance - 1, MOST_SLACK)
        ranks_per_node = cost_model.hardware.ranks_per_node
        several = 1 < ranks_per_node < caps.cp_size and caps.cp_size % ranks_per_node == 0
        self.ranks_per_node = ranks_per_node if several else None

    @property
    def exchanges(self) -> list[int | None]:
        """The exchanges to price: on several nodes one that sends KV to each node once, and always a direct one."""
        return [self.ranks_per_node, None] if self.ranks_per_node else [None]

    @property
    def best(self) -> Timed:
        """The fastest plan so far."""
        return min(self.found, key=lambda timed: timed[:2])

    def tight_plans(self) -> list[Slices]:
        """Build plans with nearly equal attention pairs on all ranks."""
        built = [plan for each in self.effort.tight for plan in self._built(each)]
        for each in self.effort.looser:
            if built:
                break
            built = self._built(each)
        return built

    def lighter_plans(self) -> list[Slices]:
        """Build plans that move less KV, in total or on the busiest rank."""
        built = [plan for each in self.effort.lighter for plan in self._built(each)]
        for base, slices in self.built[:2]:
            for part in TARGETS[: self.effort.targets]:
                built += self._spread(base, slices, part)
        if self.ranks_per_node and self.effort.lighter:
            built += [plan for flat in built[:1] for plan in node_plans(flat, self.caps, self.ranks_per_node)[1:]]
        return built

    def lightest_plans(self) -> list[Slices]:
        """Look for plans with the least KV and the fewest states."""
        if not self.effort.lightest:
            return []
        found, totals = [], (False, True) if self.effort.lighter else (False,)
        for slack in sorted({min(slack, self.slack) for slack in (0.02, math.inf)}):
            caps = self.caps.with_imbalance(1 + slack, self.caps.max_token_imbalance)
            for price in sorted({0.0, self.cost_model.state_tokens}):
                found += [search(caps, minimize_total=total, state_tokens=price) for total in totals]
            if self.ranks_per_node and self.effort.lighter:
                found += node_plans(found[-1], caps, self.ranks_per_node)
        return found

    def enter(self, built: Iterable[Slices | SliceColumns], *, regroup: bool = True, as_built: bool = False) -> None:
        """Predict the times of plans, after their ranks are regrouped by node, and keep those within the token cap.

        With `as_built` they are also kept as they are: they may use links inside and between nodes more equally.
        """
        caps = self.caps
        plans = [
            ShardPlan.from_columns(
                caps.lengths, caps.cp_size, each if isinstance(each, SliceColumns) else SliceColumns.of(each)
            )
            for each in built
        ]
        plans = [plan for plan in plans if plan.columns.sums(plan.columns.tokens).max() <= caps.most_tokens]
        if plans:
            regrouped = self._regrouped(plans, self.ranks_per_node) if self.ranks_per_node and regroup else []
            self.found += self._timed([*regrouped, *plans] if as_built or not regrouped else regrouped, self.exchanges)

    def staged(self, num_stages: int | None) -> ShardPlan:
        """Return the fastest plan, after the best ones are tried with several stages."""
        best = sorted(self.found, key=lambda timed: timed[:2])
        tried = list({timed.plan: timed for timed in best}.values())[: self.effort.staged]
        staged: list[Timed] = []
        for ranks_per_node in self.exchanges:
            exchanged = [timed for timed in tried if timed.plan.ranks_per_node == ranks_per_node]
            choices = [plan for timed in exchanged for plan in self._stagings(timed, num_stages)]
            staged += self._timed(choices, (ranks_per_node,)) if choices else []
        entered = [] if num_stages not in (None, 1) and staged else best
        return min([*entered, *staged], key=lambda timed: timed[:2]).plan

    def _built(self, each: Try) -> list[Slices]:
        found = []
        for token_cap in sorted({1.0, self.caps.max_token_imbalance}):
            caps = self.caps.with_imbalance(1 + min(each.slack, self.slack), token_cap)
            construction = Construction(caps, each.settings, most_packs=self.effort.packs)
            if (slices := _complete(construction)) is not None:
                self.built.append((construction, slices))
                found.append(slices)
        return found

    def _spread(self, base: Construction, slices: Slices, part: float) -> list[Slices]:
        """Build a plan whose busiest rank should move only a part of what it moves in the plan of `base`."""
        plan = ShardPlan(self.caps.lengths, self.caps.cp_size, slices)
        target = part * max(map(max, plan.kv_moved()))
        settings = base.settings._replace(load_weight=1.0)
        spread = _complete(Construction(base.caps, settings, target, base.tails, most_packs=self.effort.packs))
        return [] if spread is None else [spread]

    def _regrouped(self, plans: Sequence[ShardPlan], ranks_per_node: int) -> list[ShardPlan]:
        """Return the plans with their ranks in an order in which those that share documents share a node."""
        traffic = rank_traffic(JoinedPlans(plans).cut_slices, self.caps.cp_size, len(plans))
        return [
            ShardPlan.from_columns(
                plan.lengths, plan.cp_size, plan.columns.reordered(group_ranks(moved, ranks_per_node))
            )
            for plan, moved in zip(plans, traffic)
        ]

    def _timed(self, plans: Sequence[ShardPlan], exchanges: Iterable[int | None]) -> list[Timed]:
        """Return the plans with their times in each exchange: hierarchical, with so many ranks per node, or direct."""
        joined = JoinedPlans(plans)
        found: list[Timed] = []
        shape = len(plans), self.caps.cp_size
        beyond = np.maximum(joined.pairs.reshape(shape).max(1) - self.caps.most_pairs, 0).tolist()
        for ranks_per_node in exchanges:
            time = self.cost_model.joined_step_time(joined, ranks_per_node is not None)
            seconds = time.of_ranks.reshape(shape)
            slowest = seconds.argmax(1)[:, None]
            columns = (
                np.take_along_axis(values.reshape(shape), slowest, 1)[:, 0].tolist()
                for values in (seconds, time.exposed)
            )
            exchanged = [plan.with_ranks_per_node(ranks_per_node) for plan in plans]
            found += map(Timed._make, zip(beyond, next(columns), exchanged, next(columns)))
        return found

    def _stagings(self, timed: Timed, num_stages: int | None) -> list[ShardPlan]:
        """Return the plan in `num_stages` stages or, if that is `None`, in several numbers of stages."""
        plan, most = timed.plan, self.caps.cp_size - 1
        if num_stages is None:
            waits = timed.exposed > WAITS * timed.seconds and plan.num_tokens >= LAUNCH_BOUND * plan.cp_size
            counts = sorted({min(stages, most) for stages in self.effort.stages}) if waits and most > 1 else []
        else:
            counts = [num_stages] if min(num_stages, most) > 1 else []
        if not counts:
            return []
        loads = offset_loads(rank_traffic(JoinedPlans([plan]).cut_slices, plan.cp_size, 1)[0])
        return [plan.with_offset_groups(offset_groups(loads, count)) for count in counts]


def _complete(construction: Construction) -> Slices | None:
    """Return the slices of a construction, with tokens on every rank, or `None` if it leads to no plan."""
    slices = construction.run()
    if slices is not None:
        give_empty_ranks_a_token(slices)
    return slices
