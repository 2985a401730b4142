"""The plans that the strategy "search" has found for a batch, each with what it costs."""

from __future__ import annotations

import math
from functools import cached_property

from ...plan.slices import Slices
from ...plan.traffic import full_attention_traffic
from ..caps import Caps
from ..lower_bound import least_kv
from ..sharding import give_empty_ranks_a_token
from .build import Construction
from .repair import repair
from .settings import SETTINGS, Settings
from .tail import Tails


WITHIN = 1.1
"""A plan may need this much more KV than the least found if its busiest rank needs less."""


class Candidate:
    """A plan, its number of slices, and the tokens whose KV travels: in all, and to or from the busiest rank. One that
    was constructed has its settings, and the tails that were cut off."""

    def __init__(self, slices: Slices, settings: Settings | None = None, tails: Tails | None = None):
        self.slices, self.settings, self.tails = slices, settings, tails
        self.count = sum(map(len, slices))
        received, sent = full_attention_traffic(slices)
        self.total, self.bottleneck = sum(received), max(max(received), max(sent))


class Candidates:
    """Plans of one batch, collected setting by setting, within `limits`: its caps, raised where nothing meets them."""

    def __init__(self, caps: Caps):
        self.caps = self.limits = caps
        self.found: list[Candidate] = []
        self.untried = list(SETTINGS)

    @cached_property
    def lower_bound(self) -> int:
        return least_kv(self.caps)

    def keep(self, slices: Slices, settings: Settings | None = None, tails: Tails | None = None) -> Candidate | None:
        """Measures a plan and keeps it if it is within the limits."""
        give_empty_ranks_a_token(slices)
        candidate = None
        if self.limits.allow(slices):
            candidate = Candidate(slices, settings, tails)
            self.found.append(candidate)
        return candidate

    def build(
        self, settings: Settings, target: float = math.inf, before: Tails | None = None, spreading: float = 1.0
    ) -> Candidate | None:
        """Builds a plan and keeps it: arguments of [`Construction`]."""
        construction = Construction(self.limits, settings, target, before, spreading)
        slices = construction.run()
        return None if slices is None else self.keep(slices, settings, construction.tails)

    def build_like(self, base: Candidate, target: float, spreading: float) -> Candidate | None:
        """Builds a plan like a constructed one, in which ranks should not receive or send more than `target`."""
        assert base.settings is not None, "a plan that was constructed"
        return self.build(base.settings._replace(load_weight=1.0), target, base.tails, spreading)

    def build_next(self, count: int, near: float) -> None:
        """Builds plans of little total by the next `count` settings, or until one is found and `near` the lower
        bound."""
        while self.untried and (count > 0 or not self.found) and not self.is_within(near):
            self.build(self.untried.pop(0))
            count -= 1

    def repair(self, slices: Slices, solves: int) -> None:
        """Keeps the same plan with up to `solves` pairs of ranks planned anew."""
        repaired = repair(slices, self.limits, solves)
        if repaired is not None:
            self.keep(repaired)

    def least(self) -> Candidate:
        return best_of(self.found, minimize_total=True)

    def is_within(self, factor: float) -> bool:
        """Whether the least total is at most `factor` times the lower bound."""
        total = self.least().total if self.found else math.inf
        return total == 0 or (total < math.inf and total <= factor * self.lower_bound)


def best_of(found: list[Candidate], minimize_total: bool) -> Candidate:
    """The plan of the least total; or, of those near it, the one whose busiest rank has the least."""
    if minimize_total:
        return min(found, key=lambda plan: (plan.total, plan.bottleneck, plan.count))
    least = min(plan.total for plan in found)
    close = [plan for plan in found if plan.total <= WITHIN * least]
    return min(close, key=lambda plan: (plan.bottleneck, plan.count, plan.total))
