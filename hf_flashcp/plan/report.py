"""Computes the costs of a plan in one attention layer, which [`ShardPlan.report`] returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .calls import full_attention_calls, window_calls
from .copied_bytes import RowBytes, bytes_copied
from .hierarchical_traffic import traffic_by_link
from .kernel_calls import count_blocks
from .moved import rank_pairs, states_moved


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


def plan_costs(plan: ShardPlan, window: int | None = None) -> dict[str, Any]:
    """Return the report without its counts of calls.

    For full attention the time that this takes depends only on the number of slices.
    """
    tokens, pairs = plan.columns.sums(plan.columns.tokens).tolist(), rank_pairs(plan, window)
    received, sent = plan.kv_moved(window)
    kv_total, kv_all_gather = sum(received), (plan.cp_size - 1) * plan.num_tokens
    return {
        "tokens": tokens,
        "pairs": pairs,
        "kv_received": list(received),
        "kv_sent": list(sent),
        "grad_received": list(sent),
        "grad_sent": list(received),
        "kv_total": kv_total,
        "kv_all_gather": kv_all_gather,
        "kv_fraction": kv_total / kv_all_gather if kv_all_gather else 0.0,
        "token_imbalance": max(tokens) * plan.cp_size / sum(tokens),
        "pair_imbalance": max(pairs) * plan.cp_size / sum(pairs),
    }


def _state_costs(plan: ShardPlan) -> dict[str, list[int]]:
    """Return the counts of slices whose states travel, which only recurrent layers send."""
    received, sent = states_moved(plan)
    grad_received, grad_sent = states_moved(plan, backwards=True)
    return {
        "states_received": list(received),
        "states_sent": list(sent),
        "state_grads_received": list(grad_received),
        "state_grads_sent": list(grad_sent),
    }


def plan_report(
    plan: ShardPlan,
    window: int | None,
    ranks_per_node: int | None,
    kernel: str | None,
    query_heads: int,
    row: RowBytes,
) -> dict[str, Any]:
    """Return the report of [`ShardPlan.report`].

    With `ranks_per_node` it has the traffic inside and between nodes, and with `kernel` the calls of that kernel and
    the bytes that are copied around them.
    """
    window = plan.hiding_window(window)
    calls = full_attention_calls(plan) if window is None else window_calls(plan, window)
    report = {**plan_costs(plan, window), **_state_costs(plan), **calls}
    if plan.ranks_per_node is not None:
        report["collectives"] = [2 * count for count in report["collectives"]]
    if ranks_per_node is not None:
        for way, parts in zip(("received", "sent"), traffic_by_link(plan, ranks_per_node, window)):
            report[f"intra_node_{way}"], report[f"inter_node_{way}"] = parts.tolist()
    if kernel is not None:
        report |= count_blocks(plan, window, kernel, query_heads)
        report["bytes_copied"] = bytes_copied(plan, window, row)
    return report
