"""Strategy "search": little KV on the wire, spread over the ranks, under the caps.

Plans are built whole (`search_build`), a few of little total, more where these stay far above the lower bound. Then,
from what the best of them says on how many ranks hold each giant, ones that keep every rank's receiving and sending
under a target (own heads instead of short documents beside the tails); or, for the least total, pairs of ranks are
planned anew (`search_repair`). All are measured exactly, beside Algorithm 1's (`search_reference`); the best is
returned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from ...plan.slices import Slices, rank_pairs, rank_tokens
from ...plan.traffic import full_attention_traffic
from ..lower_bound import kv_lower_bound
from ..sharding import give_empty_ranks_a_token, per_doc
from .construction import Budget, Construction, Settings
from .reference import better_algorithm1
from .repair import repair


WITHIN = 1.1
"""A plan may need this much more KV than the least found if its largest rank needs less."""

NEAR = 1.03
"""Plans of at most this multiple of the lower bound are not improved any further."""

FAR = 1.2
"""Plans above this multiple of the lower bound are worth a longer search."""

SETTINGS = (
    Settings(),
    Settings("largest", whole_first=True, token_weight=0.7, reserve=0.05),
    Settings("smallest"),
    Settings("same", whole_first=True, token_weight=0.7, reserve=0.5),
    Settings("largest", whole_first=True, reserve=0.3),
    Settings("smallest", token_weight=0.7, reserve=0.1),
    Settings("largest", whole_first=True, token_weight=0.7),
    Settings("same", whole_first=True, reserve=0.15),
    Settings("largest", whole_first=True, filling=0.7),
    Settings("largest", whole_first=True, filling=0.4),
)
"""In the order of what each adds to those before it, on drawn packs."""

TRIES = (
    (90, 2, 6, 8, 3, 40),
    (400, 2, 6, 8, 1, 12),
    (1000, 2, 4, 8, 1, 12),
    (4000, 2, 2, 4, 1, 8),
    (math.inf, 1, 1, 1, 0, 0),
)
"""Up to which size of a batch, documents + 4 x ranks: how many of the settings are tried, how many plans with a target
for the bottleneck; for the least total, how many more settings, how many plans are repaired, and how many pairs of
ranks are planned anew in each."""


class Candidate:
    """A plan with what it costs."""

    def __init__(self, slices: Slices, construction: Construction | None = None):
        self.slices, self.construction = slices, construction
        self.most_pairs, self.most_tokens = max(rank_pairs(slices)), max(rank_tokens(slices))
        self.count = sum(map(len, slices))
        received, sent = full_attention_traffic(slices)
        self.total, self.bottleneck = sum(received), max(max(received), max(sent))


class Search:
    """Plans of one batch, collected setting by setting."""

    def __init__(self, lengths: tuple[int, ...], cp_size: int, max_imbalance: float, max_token_imbalance: float):
        self.lengths, self.cp_size = lengths, cp_size
        self.max_imbalance, self.max_token_imbalance = max_imbalance, max_token_imbalance
        self.budget = Budget(lengths, cp_size, max_imbalance, max_token_imbalance)
        self.found: list[Candidate] = []
        self.settings = list(SETTINGS)
        self.bound: int | None = None

    def keep(self, slices: Slices, construction: Construction | None = None) -> Candidate | None:
        """Measures a plan and keeps it if it is within the caps."""
        give_empty_ranks_a_token(slices)
        candidate = Candidate(slices, construction)
        if candidate.most_pairs > self.budget.most_pairs or candidate.most_tokens > self.budget.most_tokens:
            return None
        self.found.append(candidate)
        return candidate

    def attempt(self, *options) -> Candidate | None:
        construction = Construction(self.budget, *options)
        slices = construction.run()
        return None if slices is None else self.keep(slices, construction)

    def least(self) -> Candidate:
        return _best(self.found, minimize_total=True)

    def is_within(self, factor: float) -> bool:
        """Whether the least total is at most `factor` times the lower bound."""
        if not self.found:
            return False
        total = self.least().total
        if not total:
            return True
        if self.bound is None:
            caps = self.max_imbalance, self.max_token_imbalance
            self.bound = kv_lower_bound(self.lengths, self.cp_size, *caps)
        return total <= factor * self.bound

    def first_plans(self, count: int, factor: float = NEAR) -> None:
        """Plans of little total by the next `count` settings, more where none is found, fewer where one is within
        `factor` of the bound."""
        while self.settings and (count > 0 or not self.found) and not self.is_within(factor):
            self.attempt(self.settings.pop(0))
            count -= 1

    def repaired(self, slices: Slices, solves: int) -> Candidate | None:
        repaired = repair(slices, self.budget, solves)
        return None if repaired is slices else self.keep(repaired)

    def forced(self, solves: int) -> None:
        """Where no construction meets the cap on pairs: one that exceeds it, repaired."""
        for excess in (1.03, 1.1, 1.3):
            budget = copy.copy(self.budget)
            budget.most_pairs = int(excess * budget.most_pairs)
            for settings in SETTINGS[:2]:
                slices = Construction(budget, settings).run()
                if slices is not None:
                    give_empty_ranks_a_token(slices)
                    self.repaired(slices, solves)
            if self.found:
                return

    def reference(self, total: float = math.inf, bottleneck: float = math.inf) -> Candidate | None:
        """Algorithm 1's plan, if it is within the caps and may be below one of these."""
        slices = better_algorithm1(
            self.lengths, self.cp_size, self.budget.most_pairs, self.max_token_imbalance, total, bottleneck
        )
        return None if slices is None else Candidate(slices)

    def best_balanced(self) -> Candidate:
        """For caps that nothing meets: Per-Doc, its rank labels rotated or not."""
        known = [Candidate(per_doc(self.lengths, self.cp_size, rotate)) for rotate in (False, True)]
        return min(known, key=lambda plan: (plan.most_pairs, plan.total, plan.bottleneck, plan.count))

    def spread(self, base: Construction, target: float, spreading: float) -> Candidate | None:
        """A plan like the base's, in which ranks should not receive or send more than `target`."""
        settings = base.settings._replace(load_weight=1.0)
        return self.attempt(settings, target, base.peeled, spreading)

    def lower_bottleneck(self, base: Candidate, target: float, most_total: float, tries: int) -> None:
        """Looks for plans of at most `most_total` whose largest rank receives and sends little, with targets that
        follow what has been reached."""
        assert base.construction is not None, "a plan that was constructed"
        met, missed, spreading = float(base.bottleneck), 0.0, 1.0
        for _ in range(tries):
            plan = self.spread(base.construction, target, spreading)
            if plan is None or plan.total > most_total:
                if spreading > 0.5:
                    spreading = 0.5
                    continue
                missed, target = target, (target + met) / 2
            elif plan.bottleneck > 1.03 * target and spreading == 1.0:
                spreading = 1.6
                continue
            else:
                met, target = target, (target + missed) / 2 if missed else 0.88 * target
            spreading = 1.0


def search(
    lengths: Sequence[int],
    cp_size: int,
    *,
    max_imbalance: float = 1.05,
    max_token_imbalance: float = 1.0,
    minimize_total: bool = False,
) -> Slices:
    """Slices of every rank: little KV in all, and little on the rank with the most of it.

    Never above Algorithm 1 at the same caps in total, nor (but for `minimize_total`) in what the largest rank receives
    or sends, unless that exceeds them: where no better plan is found, it is Algorithm 1's. Pure and deterministic.

    Args:
        lengths (`Sequence[int]`): tokens of each document, at least 1.
        cp_size (`int`): number of ranks, at most as many as there are tokens.
        max_imbalance (`float`): the most attention pairs of a rank over the mean. Where it cannot be met, Per-Doc.
        max_token_imbalance (`float`): the most tokens of a rank over the mean; 1.0 is equal within one token.
        minimize_total (`bool`): whether the total counts first; never above what is found without, and takes a few
            times as long. Else, of the plans within 10% of the least total, the one whose largest rank has least,
            then the one of the fewest slices.
    """
    lengths = tuple(lengths)
    if cp_size == 1:
        return per_doc(lengths, 1)
    looking = Search(lengths, cp_size, max_imbalance, max_token_imbalance)
    settings, targets, more, repaired, solves = next(row[1:] for row in TRIES if len(lengths) + 4 * cp_size <= row[0])
    looking.first_plans(settings)
    looking.first_plans(targets - settings, FAR)
    if not looking.found:
        looking.forced(solves)
    if looking.found:
        base = looking.least()
        below = WITHIN * base.total, base.bottleneck
        reference = looking.reference(*below)
    else:
        reference = looking.reference()
        if reference is None:
            # Nothing known meets the cap on pairs: no more than the best balanced plan has.
            reference = looking.best_balanced()
            looking.budget.most_pairs = reference.most_pairs
            looking.settings = list(SETTINGS)
            looking.first_plans(settings)
        looking.repaired(reference.slices, solves)
    limit = reference.bottleneck if reference else math.inf
    constructed = [plan for plan in looking.found if plan.construction]
    if constructed:
        base = _best(constructed, minimize_total=True)
        looking.lower_bottleneck(base, min(0.85 * base.bottleneck, limit), WITHIN * looking.least().total, targets)
    if minimize_total:
        looking.first_plans(more)
        if not looking.is_within(NEAR):
            for plan in sorted(looking.found, key=lambda plan: plan.total)[:repaired]:
                looking.repaired(plan.slices, solves)
    found = looking.found
    if reference is None:
        best = _best(found, minimize_total)
        if best.total > below[0] or best.bottleneck > below[1]:
            reference = looking.reference(best.total, best.bottleneck)
    if reference and minimize_total:
        found = [*found, reference]
    elif reference:
        close = [plan for plan in found if plan.total <= reference.total and plan.bottleneck <= reference.bottleneck]
        found = [*close, reference]
    return _best(found, minimize_total).slices


def _best(found: list[Candidate], minimize_total: bool) -> Candidate:
    if minimize_total:
        return min(found, key=lambda plan: (plan.total, plan.bottleneck, plan.count))
    least = min(plan.total for plan in found)
    close = [plan for plan in found if plan.total <= WITHIN * least]
    return min(close, key=lambda plan: (plan.bottleneck, plan.count, plan.total))
