"""Plans whose busiest rank receives and sends less: like one that was built, but with a target for every rank."""

from __future__ import annotations

from .build import Construction
from .candidates import Candidate, Candidates


def spread(candidates: Candidates, base: Construction, target: float, spreading: float) -> Candidate | None:
    """Builds a plan like the base's, in which ranks should not receive or send more than `target`."""
    return candidates.build(base.settings._replace(load_weight=1.0), target, base.tails, spreading)


def lower_bottleneck(candidates: Candidates, base: Candidate, target: float, most_total: float, tries: int) -> None:
    """Looks for plans of at most `most_total` whose busiest rank receives and sends little, with targets that follow
    what has been reached."""
    assert base.construction is not None, "a plan that was constructed"
    met, missed, spreading = float(base.bottleneck), 0.0, 1.0
    for _ in range(tries):
        plan = spread(candidates, base.construction, target, spreading)
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
