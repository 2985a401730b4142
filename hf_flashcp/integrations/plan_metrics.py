"""Means of what plans cost, for logs."""

from __future__ import annotations

from ..planning import ShardPlan


class PlanMetrics:
    """Means over the packs that have been trained on."""

    def __init__(self):
        self._packs = 0
        self._sums = {"kv_total": 0, "kv_all_gather": 0, "token_imbalance": 0.0, "pair_imbalance": 0.0}
        self._planned = 0
        self._planning_seconds = 0.0

    def add(self, plan: ShardPlan) -> None:
        report = plan.report()
        self._packs += 1
        for key in self._sums:
            self._sums[key] += report[key]
        if plan.planning_seconds is not None:
            self._planned += 1
            self._planning_seconds += plan.planning_seconds

    def means(self) -> dict[str, float]:
        """Empty before the first pack, then `flashcp_kv_fraction` (KV moved against an all-gather, over all packs),
        `flashcp_token_imbalance` and `flashcp_pair_imbalance` (max / mean over ranks) and `flashcp_plan_ms`
        (milliseconds that planning a pack took, wherever it was done; absent for plans that were not timed)."""
        if not self._packs:
            return {}
        means = {
            "flashcp_kv_fraction": self._sums["kv_total"] / max(self._sums["kv_all_gather"], 1),
            "flashcp_token_imbalance": self._sums["token_imbalance"] / self._packs,
            "flashcp_pair_imbalance": self._sums["pair_imbalance"] / self._packs,
        }
        if self._planned:
            means["flashcp_plan_ms"] = 1000 * self._planning_seconds / self._planned
        return means
