"""Strategy "search": looks for a plan with little KV on the wire, spread evenly over the ranks, under the caps."""

from __future__ import annotations

import math

from ...plan.slices import Slices, rank_pairs
from ..algorithm1 import algorithm1
from ..caps import Caps
from ..sharding import give_empty_ranks_a_token, per_doc
from .build import Construction
from .candidates import WITHIN, Candidate, Candidates, best_of
from .settings import SETTINGS, Effort, effort_for


NEAR = 1.03
"""Plans with at most this multiple of the lower bound are not improved any further."""

FAR = 1.2
"""Plans above this multiple of the lower bound are worth a longer search."""

BELOW = ((0.94, 0.5), (0.97, 1.3), (0.97, 0.5), (0.9, 0.5), (0.97, 1.0))
"""Pairs of target, as a fraction of the bottleneck of Algorithm 1's plan, and spreading, for plans that are to be
nowhere above that plan. [`Construction`] explains both."""

MOST_WORK = 4_000_000
"""The most slices to build in rounds of Algorithm 1. Only batches of thousands of documents on hundreds of ranks reach
this limit. Algorithm 1 would take minutes for them."""


def search(caps: Caps, *, minimize_total: bool = False, state_tokens: float = 0.0) -> Slices:
    """Return the slices of every rank in a plan with little KV in total and on the busiest rank.

    Of the plans found within 10% of the least total KV, this is the one whose busiest rank receives or sends the least
    KV; ties go to the fewest slices. With `minimize_total` it is the plan with the least total. That total is never
    higher than without the option, and the search takes a few times as long. Pure and deterministic.

    If Algorithm 1 has a plan within the caps, the result never moves more KV than that plan in total, nor (without
    `minimize_total`) on the busiest rank; if no better plan is found, it is that plan. If no plan meets the cap on
    pairs, the result is at least as balanced as Per-Doc with or without rotated ranks, whichever is more balanced.

    With `state_tokens`, the plans that are found are the same, but are compared by [`Candidate.priced`] traffic.
    """
    return per_doc(caps.lengths, 1) if caps.cp_size == 1 else _best_found(caps, minimize_total, state_tokens).slices


def _best_found(caps: Caps, minimize_total: bool, state_tokens: float) -> Candidate:
    candidates, effort = Candidates(caps), effort_for(caps)
    candidates.build_next(effort.settings, NEAR)
    candidates.build_next(effort.targets - effort.settings, FAR)
    if not candidates.found:
        _build_beyond_caps(candidates, effort.solves)
    # Plans of Algorithm 1 that reach both limits would not be chosen.
    most_total = most_bottleneck = math.inf
    if candidates.found:
        least = candidates.least()
        most_total, most_bottleneck = WITHIN * least.total, least.bottleneck
    reference = _algorithm1_below(caps, most_total, most_bottleneck)
    if not candidates.found:
        reference = reference or _raise_limits(candidates, effort)
        candidates.repair(reference.slices, effort.solves)
    _spread_traffic(candidates, reference.bottleneck if reference else math.inf, effort.targets)
    if reference:
        _go_below(candidates, reference, effort.targets)
    if minimize_total:
        _lower_total(candidates, effort)
    if state_tokens:
        if reference is None and most_total > 0:
            reference = _algorithm1_below(caps, math.inf, math.inf)
        found = [plan.priced(caps.lengths, state_tokens) for plan in candidates.found]
        return _choose(found, reference and reference.priced(caps.lengths, state_tokens), minimize_total)
    if reference is None:
        best = best_of(candidates.found, minimize_total)
        if best.total > most_total or best.bottleneck > most_bottleneck:
            reference = _algorithm1_below(caps, best.total, best.bottleneck)
    return _choose(candidates.found, reference, minimize_total)


def _build_beyond_caps(candidates: Candidates, solves: int) -> None:
    """Build plans that exceed the cap on pairs, and repair them. This is done if no construction meets the cap."""
    for excess in (1.03, 1.1, 1.3):
        raised = candidates.caps.with_most(pairs=int(excess * candidates.caps.most_pairs))
        for settings in SETTINGS[:2]:
            slices = Construction(raised, settings).run()
            if slices is not None:
                give_empty_ranks_a_token(slices)
                candidates.repair(slices, solves)
        if candidates.found:
            return


def _algorithm1_below(caps: Caps, total: float, bottleneck: float) -> Candidate | None:
    """Return the plan of Algorithm 1 if it is within the caps and may be below `total` or `bottleneck`."""
    slices = algorithm1(caps, total, bottleneck, MOST_WORK)
    return None if slices is None else Candidate(slices)


def _raise_limits(candidates: Candidates, effort: Effort) -> Candidate:
    """Raise the cap on pairs to that of the best balanced plan, build plans under it, and return the balanced plan.

    This is done if no plan meets the cap.
    """
    caps = candidates.caps
    known = [Candidate(per_doc(caps.lengths, caps.cp_size, rotate_ranks)) for rotate_ranks in (False, True)]
    balanced = min(known, key=lambda plan: (max(rank_pairs(plan.slices)), plan.total, plan.bottleneck, plan.count))
    candidates.limits = caps.with_most(pairs=max(rank_pairs(balanced.slices)))
    candidates.untried = list(SETTINGS)
    candidates.build_next(effort.settings, NEAR)
    return balanced


def _spread_traffic(candidates: Candidates, most_bottleneck: float, tries: int) -> None:
    """Look for plans whose busiest rank moves less than in the best built plan.

    Each target depends on whether the plans before it met theirs.
    """
    built = [plan for plan in candidates.found if plan.settings]
    if not built:
        return
    base, most_total = best_of(built, minimize_total=True), WITHIN * candidates.least().total
    target = min(0.85 * base.bottleneck, most_bottleneck)
    met, missed, spreading = float(base.bottleneck), 0.0, 1.0
    for _ in range(tries):
        plan = candidates.build_like(base, target, spreading)
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


def _go_below(candidates: Candidates, reference: Candidate, tries: int) -> None:
    """Look for plans that are nowhere above that of Algorithm 1, if none of those found is."""
    if not reference.total or any(plan.is_nowhere_above(reference) for plan in candidates.found):
        return
    tried = len(SETTINGS) - len(candidates.untried)
    candidates.build_next(2 - tried, near=0)
    built = [plan for plan in candidates.found if plan.settings in SETTINGS]
    for base in sorted(built, key=lambda plan: plan.total)[:2]:
        for share, spreading in BELOW[:tries]:
            candidates.build_like(base, share * reference.bottleneck, spreading)


def _lower_total(candidates: Candidates, effort: Effort) -> None:
    """Build more plans, then re-plan pairs of ranks in those with the least total."""
    candidates.build_next(effort.more_settings, NEAR)
    if not candidates.is_within(NEAR):
        for plan in sorted(candidates.found, key=lambda plan: plan.total)[: effort.repaired]:
            candidates.repair(plan.slices, effort.solves)


def _choose(found: list[Candidate], reference: Candidate | None, minimize_total: bool) -> Candidate:
    """Return the best plan. If there is a reference, only plans that are nowhere above it are considered."""
    if reference and not minimize_total:
        found = [plan for plan in found if plan.is_nowhere_above(reference)]
    return best_of([*found, reference] if reference else found, minimize_total)
