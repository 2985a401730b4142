"""Counts the calls of one attention layer on each rank: collectives, kernels, and copies of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .rectangles import key_ranges
from .stage_traffic import stage_traffic


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


Calls = dict[str, list[int]]
"""Number of calls per rank, forward and backward together: `collectives` (the same on every rank), `kernel_calls` (of
a kernel that takes any number of sequences) and `copies` (passes over rows; K and V count as one)."""


def full_attention_calls(plan: ShardPlan) -> Calls:
    """Count the calls of one full-attention layer.

    A copy is one pass over rows. A rank that sends rows makes two for all stages together: it packs the rows, and adds
    the gradients that come back. A rank that receives rows also makes two for all stages together: it merges the
    outputs, and adds the gradients of its queries. For each stage it packs the gradients of the keys, and if the keys
    of some slice do not arrive in one range ([`key_ranges`]), it puts the keys in document order beforehand.
    """
    received, sent = plan.kv_moved()
    kernel_calls, copies = [2] * plan.cp_size, [2 * bool(out) + 2 * bool(into) for out, into in zip(sent, received)]
    stages = stage_traffic(plan)
    for rank in range(plan.cp_size):
        slices = plan.slice_table.of_rank(rank)
        for stage in stages:
            pieces = stage.received(rank)
            if len(pieces.senders):
                kernel_calls[rank] += 2
                one_sender = pieces.senders[0] == pieces.senders[-1]
                copies[rank] += 1 if one_sender or key_ranges(slices, pieces.spans).order is None else 2
    return {"collectives": [2 * len(stages)] * plan.cp_size, "kernel_calls": kernel_calls, "copies": copies}


def window_calls(plan: ShardPlan, window: int) -> Calls:
    """Count the calls of a layer whose window is shorter than some document.

    There is one stage. Its keys are assembled from received and local rows, and their gradients are packed. Results
    are not merged: if there is a local pass, too, outputs and gradients of queries are written to their rows in one
    pass each. Gradients of keys from the local pass, the stage and other ranks are added in one pass.
    """
    _, sent = plan.kv_moved(window)
    kernel_calls, copies = [], []
    for rank_slices, rows in zip(plan.slices, sent):
        waits = window > 1 and any(start > 0 for _, start, _ in rank_slices)
        local = any(start == 0 or stop - start >= window for _, start, stop in rank_slices)
        kernel_calls.append(2 * (waits + local))
        copies.append(bool(rows) + (waits or bool(rows)) + 2 * waits + 2 * (waits and local))
    collectives = [2 if any(sent) else 0] * plan.cp_size
    return {"collectives": collectives, "kernel_calls": kernel_calls, "copies": copies}
