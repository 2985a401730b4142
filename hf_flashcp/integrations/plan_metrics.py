"""Means of what plans cost, for logs."""

from __future__ import annotations

from ..planning import ShardPlan


class PlanMetrics:
    """Means over the packs that have been trained on: over the run, and since they were last logged."""

    def __init__(self):
        self._run = _Sums()
        self._interval = _Sums()

    def add(self, plan: ShardPlan) -> None:
        report = plan.report()
        for sums in (self._run, self._interval):
            sums.add(report, plan.planning_seconds)

    def means(self) -> dict[str, float]:
        """Empty before the first pack, then `flashcp_kv_fraction` (KV moved against an all-gather, over all packs),
        `flashcp_token_imbalance` and `flashcp_pair_imbalance` (max / mean over ranks) and `flashcp_plan_ms`
        (milliseconds that planning a pack took, wherever it was done; absent for plans that were not timed)."""
        return self._run.means()

    def take_interval_means(self) -> dict[str, float]:
        """[`~PlanMetrics.means`] of the packs since the last call."""
        interval, self._interval = self._interval, _Sums()
        return interval.means()


class _Sums:
    def __init__(self):
        self.packs = 0
        self.reported = {"kv_total": 0, "kv_all_gather": 0, "token_imbalance": 0.0, "pair_imbalance": 0.0}
        self.timed = 0
        self.planning_seconds = 0.0

    def add(self, report: dict, planning_seconds: float | None) -> None:
        self.packs += 1
        for key in self.reported:
            self.reported[key] += report[key]
        if planning_seconds is not None:
            self.timed += 1
            self.planning_seconds += planning_seconds

    def means(self) -> dict[str, float]:
        if not self.packs:
            return {}
        means = {
            "flashcp_kv_fraction": self.reported["kv_total"] / max(self.reported["kv_all_gather"], 1),
            "flashcp_token_imbalance": self.reported["token_imbalance"] / self.packs,
            "flashcp_pair_imbalance": self.reported["pair_imbalance"] / self.packs,
        }
        if self.timed:
            means["flashcp_plan_ms"] = 1000 * self.planning_seconds / self.timed
        return means
