"""Strategy "search": little KV on the wire, spread over the ranks, under the caps.

A few plans are built whole (`search_build`): first the ones of little total, then, from what they say on how many
ranks hold each giant, ones that keep every rank's receiving and sending under a target (own heads instead of short
documents beside the tails). All are measured exactly, beside Algorithm 1's (`search_reference`); the best is returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .search_build import Budget, Construction
from .search_reference import better_algorithm1
from .sharding import Slices, give_empty_ranks_a_token, per_doc
from .volume import full_attention_traffic


WITHIN = 1.1
"""A plan may need this much more KV than the least found if its largest rank needs less."""

TRIES = ((400, 6), (1000, 4), (4000, 2), (math.inf, 1))
"""Up to which size of a batch, documents + 4 x ranks, how many plans with a target for the bottleneck are tried."""

TOTALS_TRIED = ((1.0, 1.0), (1.0, 0.5), (1.0, 1.6), (0.93, 1.0), (0.93, 0.5), (0.93, 1.6))
"""`(target, spreading)` for the least total below Algorithm 1's bottleneck, the target as a multiple of that."""


class Candidate:
    """A plan with what it costs."""

    def __init__(self, slices: Slices, construction: Construction | None = None):
        self.slices, self.construction = slices, construction
        self.most_pairs = max(
            sum((stop - start) * (stop + start + 1) // 2 for _, start, stop in held) for held in slices
        )
        self.most_tokens = max(sum(stop - start for _, start, stop in held) for held in slices)
        self.count = sum(map(len, slices))
        received, sent = full_attention_traffic(len(slices), slices)
        self.total, self.bottleneck = sum(received), max(max(received), max(sent))


class Search:
    """Plans of one batch, collected setting by setting."""

    def __init__(self, lengths: tuple[int, ...], cp_size: int, max_imbalance: float, max_token_imbalance: float):
        self.lengths, self.cp_size, self.max_token_imbalance = lengths, cp_size, max_token_imbalance
        self.budget = Budget(lengths, cp_size, max_imbalance, max_token_imbalance)
        self.found: list[Candidate] = []

    def attempt(self, **settings) -> Candidate | None:
        """Builds a plan and keeps it if it is within the caps."""
        construction = Construction(self.budget, **settings)
        slices = construction.run()
        if slices is None:
            return None
        give_empty_ranks_a_token(slices)
        candidate = Candidate(slices, construction)
        if candidate.most_pairs > self.budget.most_pairs or candidate.most_tokens > self.budget.most_tokens:
            return None
        self.found.append(candidate)
        return candidate

    def first_plans(self, tries: int) -> None:
        """Plans of little total, more of them for small batches or where it is hard to find one."""
        if self.attempt() is None or tries > 3:
            self.attempt(whole_first=False)
        for filling in (0.7, 0.4):
            if not self.found:
                self.attempt(filling=filling)

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

    def spread(self, base: Candidate, target: float, spreading: float) -> Candidate | None:
        """A plan like the base's, in which ranks should not receive or send more than `target`."""
        settings = base.construction
        return self.attempt(
            token_weight=settings.token_weight,
            load_weight=1.0,
            whole_first=settings.whole_first,
            target=target,
            before=settings.peeled,
            spreading=spreading,
        )

    def lower_bottleneck(self, base: Candidate, target: float, most_total: float, tries: int) -> None:
        """Looks for plans of at most `most_total` whose largest rank receives and sends little, with targets that
        follow what has been reached."""
        met, missed, spreading = base.bottleneck, 0.0, 1.0
        for _ in range(tries):
            plan = self.spread(base, target, spreading)
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

    Never above Algorithm 1 at the same caps, in total or in what the largest rank receives or sends, unless that
    exceeds them: where no better plan is found, it is Algorithm 1's. Pure and deterministic.

    Args:
        lengths (`Sequence[int]`): tokens of each document, at least 1.
        cp_size (`int`): number of ranks, at most as many as there are tokens.
        max_imbalance (`float`): the most attention pairs of a rank over the mean. Where it cannot be met, Per-Doc.
        max_token_imbalance (`float`): the most tokens of a rank over the mean; 1.0 is equal within one token.
        minimize_total (`bool`): whether the total counts first. Else, of the plans within 10% of the least total, the
            one whose largest rank has least, then the one of the fewest slices.
    """
    lengths = tuple(lengths)
    if cp_size == 1:
        return per_doc(lengths, 1)
    looking = Search(lengths, cp_size, max_imbalance, max_token_imbalance)
    tries = next(tries for size, tries in TRIES if len(lengths) + 4 * cp_size <= size)
    looking.first_plans(tries)
    if looking.found:
        base = _best(looking.found, minimize_total=True)
        reference = looking.reference(base.total if minimize_total else WITHIN * base.total, base.bottleneck)
    else:
        reference = looking.reference()
        if reference is None:
            # Nothing known meets the cap on pairs: no more than the best balanced plan has.
            reference = looking.best_balanced()
            looking.budget.most_pairs = reference.most_pairs
            looking.first_plans(tries)
        if not looking.found:
            return reference.slices
        base = _best(looking.found, minimize_total=True)
    limit = reference.bottleneck if reference else math.inf
    if not minimize_total:
        looking.lower_bottleneck(base, min(0.85 * base.bottleneck, limit), WITHIN * base.total, tries)
    elif base.bottleneck > limit:
        for target, spreading in TOTALS_TRIED[: max(tries, 2)]:
            looking.spread(base, target * limit, spreading)
        if all(plan.bottleneck > limit for plan in looking.found):
            looking.lower_bottleneck(base, limit, reference.total, tries)
    found = looking.found
    if reference:
        found = [plan for plan in found if plan.total <= reference.total and plan.bottleneck <= limit] + [reference]
    return _best(found, minimize_total).slices


def _best(found: list[Candidate], minimize_total: bool) -> Candidate:
    if minimize_total:
        return min(found, key=lambda plan: (plan.total, plan.bottleneck, plan.count))
    least = min(plan.total for plan in found)
    close = [plan for plan in found if plan.total <= WITHIN * least]
    return min(close, key=lambda plan: (plan.bottleneck, plan.count, plan.total))
