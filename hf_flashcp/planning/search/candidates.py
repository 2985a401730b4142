"""The plans that the strategy "search" has found for a batch, with their traffic."""

from __future__ import annotations

import math
from functools import cached_property

from ...plan.contracted import states_moved
from ...plan.slices import Lengths, Slices, runs_by_document
from ...plan.traffic import full_attention_traffic
from ...predict.hybrid_config import CHUNK
from ..caps import Caps
from ..lower_bound import least_kv
from ..sharding import give_empty_ranks_a_token
from .build import Construction
from .repair import repair
from .settings import SETTINGS, Settings
from .tail import Tails


WITHIN = 1.1
"""A plan may move up to this multiple of the least KV found if its busiest rank moves less."""


class Candidate:
    """A plan and its traffic.

    Attributes:
        count (`int`): number of slices.
        total (`float`): tokens whose KV travels, summed over ranks.
        bottleneck (`float`): tokens whose KV the busiest rank receives or sends.
        settings (`Settings`, *optional*): settings of the construction, if the plan comes from one.
        tails (`Tails`, *optional*): tails that the construction cut off documents.
    """

    def __init__(self, slices: Slices, settings: Settings | None = None, tails: Tails | None = None):
        self.slices, self.settings, self.tails = slices, settings, tails
        self.count = sum(map(len, slices))
        received, sent = full_attention_traffic(slices)
        self.total: float = sum(received)
        self.bottleneck: float = max(max(received), max(sent))

    def is_nowhere_above(self, other: Candidate) -> bool:
        """Return whether neither the total nor the bottleneck is above that of another plan."""
        return self.total <= other.total and self.bottleneck <= other.bottleneck

    def priced(self, lengths: Lengths, state_tokens: float) -> Candidate:
        """Return this plan with traffic that includes the states of recurrent layers.

        A state that a rank receives or sends counts as `state_tokens` tokens of KV. So does a slice that is shorter
        than [`CHUNK`], for the rank that holds it, unless it is a whole document.
        """
        priced = Candidate(self.slices)
        short = short_slices(self.slices, lengths)
        loads = [
            [tokens + state_tokens * (states + few) for tokens, states, few in zip(*counts, short)]
            for counts in zip(full_attention_traffic(self.slices), states_moved(self.slices))
        ]
        priced.total, priced.bottleneck = sum(loads[0]), max(map(max, loads))
        return priced


def short_slices(slices: Slices, lengths: Lengths) -> list[int]:
    """Return how many slices of each rank are shorter than [`CHUNK`] and not whole documents.

    Adjacent slices on the same rank count as one.
    """
    short = [0] * len(slices)
    for document, runs in runs_by_document(slices).items():
        for rank, tokens in runs:
            short[rank] += tokens < min(CHUNK, lengths[document])
    return short


class Candidates:
    """Collects plans of one batch. All of them are within `limits`: the caps, or raised caps if no plan meets them."""

    def __init__(self, caps: Caps):
        self.caps = self.limits = caps
        self.found: list[Candidate] = []
        self.untried = list(SETTINGS)

    @cached_property
    def lower_bound(self) -> int:
        """Lower bound of the total KV of any plan within the caps."""
        return least_kv(self.caps)

    def keep(self, slices: Slices, settings: Settings | None = None, tails: Tails | None = None) -> Candidate | None:
        """Measure a plan, and keep and return it if it is within the limits."""
        give_empty_ranks_a_token(slices)
        candidate = None
        if self.limits.allow(slices):
            candidate = Candidate(slices, settings, tails)
            self.found.append(candidate)
        return candidate

    def build(
        self, settings: Settings, target: float = math.inf, before: Tails | None = None, spreading: float = 1.0
    ) -> Candidate | None:
        """Build a plan and keep it. The arguments are those of [`Construction`]."""
        construction = Construction(self.limits, settings, target, before, spreading)
        slices = construction.run()
        return None if slices is None else self.keep(slices, settings, construction.tails)

    def build_like(self, base: Candidate, target: float, spreading: float) -> Candidate | None:
        """Build a plan like a constructed one, in which no rank should receive or send more than `target` tokens."""
        assert base.settings is not None, "the base must come from a construction"
        return self.build(base.settings._replace(load_weight=1.0), target, base.tails, spreading)

    def build_next(self, count: int, near: float) -> None:
        """Build plans with little total KV from the next `count` settings, and from more until one is found.

        This ends early if the least total is at most `near` times the lower bound.
        """
        while self.untried and (count > 0 or not self.found) and not self.is_within(near):
            self.build(self.untried.pop(0))
            count -= 1

    def repair(self, slices: Slices, solves: int) -> None:
        """Re-plan up to `solves` pairs of ranks of a plan, and keep the result."""
        repaired = repair(slices, self.limits, solves)
        if repaired is not None:
            self.keep(repaired)

    def least(self) -> Candidate:
        """Return the plan with the least total KV."""
        return best_of(self.found, minimize_total=True)

    def is_within(self, factor: float) -> bool:
        """Return whether the least total is at most `factor` times the lower bound."""
        total = self.least().total if self.found else math.inf
        return total == 0 or (total < math.inf and total <= factor * self.lower_bound)


def best_of(found: list[Candidate], minimize_total: bool) -> Candidate:
    """Return the plan with the least total; without `minimize_total`, the plan near it with the least bottleneck."""
    if minimize_total:
        return min(found, key=lambda plan: (plan.total, plan.bottleneck, plan.count))
    least = min(plan.total for plan in found)
    close = [plan for plan in found if plan.total <= WITHIN * least]
    return min(close, key=lambda plan: (plan.bottleneck, plan.count, plan.total))
