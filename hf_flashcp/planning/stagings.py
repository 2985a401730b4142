"""Divides the exchange of a plan's KV into stages, each of which travels while the stage before it is computed."""

from __future__ import annotations

import numpy as np

from ..plan.shard_plan import ShardPlan


def in_stages(plan: ShardPlan, num_stages: int) -> ShardPlan:
    """Return the same plan with its KV exchanged in `num_stages` stages, at most cp_size - 1.

    The stages have consecutive ring offsets, beginning with 1. They are divided such that the busiest rank receives
    about as much in every stage.
    """
    if num_stages <= 1 or plan.cp_size <= 2:
        return plan.with_offset_groups(None)
    return plan.with_offset_groups(offset_groups(offset_loads(plan.kv_traffic()), num_stages))


def offset_loads(traffic: np.ndarray) -> list[int]:
    """Return the most tokens that any rank receives from each ring offset, beginning with offset 1.

    `traffic` is that of [`ShardPlan.kv_traffic`].
    """
    ranks = np.arange(len(traffic))
    senders = (ranks - ranks[1:, None]) % len(traffic)
    return traffic[senders, ranks].max(1).astype(np.int64).tolist()


def offset_groups(loads: list[int], num_stages: int) -> list[list[int]]:
    """Divide ring offsets with these loads into stages of about equal loads."""
    groups: list[list[int]] = []
    left, group, held = sum(loads), [], 0
    for offset, load in enumerate(loads, start=1):
        group.append(offset)
        held += load
        stages_left, offsets_left = num_stages - len(groups), len(loads) - offset
        if stages_left > 1 and (held * stages_left >= left or offsets_left < stages_left):
            groups.append(group)
            left, group, held = left - held, [], 0
    if group:
        groups.append(group)
    return groups
