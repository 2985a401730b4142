"""Metrics for logs: the mean costs of plans, and the speed of training."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

from ...exchange import seconds_waited
from ...plan import ShardPlan
from ...plan.report import plan_costs


_COSTS = ("kv_total", "kv_all_gather", "token_imbalance", "pair_imbalance")


class PlanMetrics:
    """Means over the packs of a run, and over the packs since metrics were last logged.

    Args:
        groups (`int`, *optional*, defaults to 1): number of data-parallel groups, each of which trains on one pack at
            a time.
    """

    def __init__(self, groups: int = 1):
        self._groups = groups
        self._run = _Sums()
        self._interval = _Sums()

    def add(self, plan: ShardPlan) -> None:
        """Add the pack with this plan."""
        costs = plan_costs(plan)
        for sums in (self._run, self._interval):
            sums.add(costs, plan)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside this context, such as that of evaluation."""
        begin, waited = time.perf_counter(), seconds_waited()
        yield
        for sums in (self._run, self._interval):
            sums.leave_out(time.perf_counter() - begin, (seconds_waited() or 0.0) - (waited or 0.0))

    def means(self) -> dict[str, float]:
        """Return the means over the run, or an empty dict before the first pack.

        - `flashcp_kv_fraction`: KV moved, as a share of what an all-gather would move, over all packs;
        - `flashcp_token_imbalance`, `flashcp_pair_imbalance`: max / mean over ranks, averaged over packs;
        - `flashcp_plan_ms`: milliseconds of planning per pack, in whichever process it ran; missing if plans were not
          timed;
        - `flashcp_tokens_per_second`: training speed of all data-parallel groups together, without evaluation;
        - `flashcp_exposed_transfer_ms`: milliseconds per pack that this process waited for KV and its gradients (on
          CPU only, see [`seconds_waited`]).
        """
        return self._run.means(self._groups)

    def take_interval_means(self) -> dict[str, float]:
        """Return [`~PlanMetrics.means`] of the packs since the last call.

        The time from this call to the next pack, for example for saving the model at the end, does not count in the
        speed of the run.
        """
        self._run.ended = time.perf_counter()
        interval, self._interval = self._interval, _Sums()
        self._interval.begin()
        return interval.means(self._groups)


class _Sums:
    def __init__(self):
        self.sums: Counter[str] = Counter()
        self.begun: float | None = None
        self.ended: float | None = None
        self.waited_before = 0.0

    def begin(self) -> None:
        self.begun, self.waited_before = time.perf_counter(), seconds_waited() or 0.0

    def leave_out(self, seconds: float, waited: float) -> None:
        if self.begun is not None:
            self.begun += seconds
            self.waited_before += waited

    def add(self, costs: dict, plan: ShardPlan) -> None:
        if self.begun is None:
            self.begin()
        self.ended = None
        self.sums.update({key: costs[key] for key in _COSTS}, packs=1, tokens=plan.num_tokens)
        if plan.planning_seconds is not None:
            self.sums.update(timed=1, planning_seconds=plan.planning_seconds)

    def means(self, groups: int) -> dict[str, float]:
        sums, packs = self.sums, self.sums["packs"]
        if not packs:
            return {}
        means = {
            "flashcp_kv_fraction": sums["kv_total"] / max(sums["kv_all_gather"], 1),
            "flashcp_token_imbalance": sums["token_imbalance"] / packs,
            "flashcp_pair_imbalance": sums["pair_imbalance"] / packs,
            "flashcp_tokens_per_second": groups * sums["tokens"] / ((self.ended or time.perf_counter()) - self.begun),
        }
        if sums["timed"]:
            means["flashcp_plan_ms"] = 1000 * sums["planning_seconds"] / sums["timed"]
        if (waited := seconds_waited()) is not None:
            means["flashcp_exposed_transfer_ms"] = 1000 * (waited - self.waited_before) / packs
        return means
