"""Counts the calls of one attention layer on each rank: collectives, kernels, and copies of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
    scattered = _scattered(plan) if len(stages) == 1 else np.zeros(plan.cp_size, dtype=bool)
    for rank in range(plan.cp_size):
        if scattered[rank]:
            kernel_calls[rank] += 2
            copies[rank] += 2
            continue
        slices = plan.slice_table.of_rank(rank)
        for stage in stages:
            pieces = stage.received(rank)
            if len(pieces.senders):
                kernel_calls[rank] += 2
                one_sender = pieces.senders[0] == pieces.senders[-1]
                copies[rank] += 1 if one_sender or key_ranges(slices, pieces.spans).order is None else 2
    return {"collectives": [2 * len(stages)] * plan.cp_size, "kernel_calls": kernel_calls, "copies": copies}


def _scattered(plan: ShardPlan) -> np.ndarray:
    """Return which ranks certainly have a slice whose keys do not arrive in one range, if they arrive in one stage.

    This looks at whole documents, so that its time depends only on the number of slices. Received keys lie in the
    order of their senders and, of each sender, in the order of documents. If a rank receives one document between keys
    of another one, the keys of the latter are not in one range.
    """
    holders = plan.slice_table.holders
    waits = np.flatnonzero(holders.last & (holders.place > 0))
    ranks, documents = holders.ranks[waits], holders.documents[waits]
    lift = holders.documents * plan.cp_size
    least = np.minimum.accumulate(holders.ranks - lift) + lift
    most = np.maximum.accumulate(holders.ranks + lift) - lift
    # The first two slices of a document are on different ranks, so one of them is another rank's.
    opening = waits - holders.place[waits]
    other = np.where(holders.ranks[opening] != ranks, holders.ranks[opening], holders.ranks[opening + 1])
    edges = [np.where(edge[waits - 1] != ranks, edge[waits - 1], other) for edge in (least, most)]
    begins, ends = (edge * len(plan.lengths) + documents for edge in edges)
    order = np.lexsort((begins, ranks))
    ranks, begins, ends = ranks[order], begins[order], ends[order]
    broken = (ranks[1:] == ranks[:-1]) & (begins[1:] < ends[:-1])
    return np.bincount(ranks[1:][broken], minlength=plan.cp_size) > 0


def window_calls(plan: ShardPlan, window: int) -> Calls:
    """Count the calls of a layer whose window is shorter than some document.

    There is one stage. Its keys are assembled from received and local rows, and their gradients are packed. Results
    are not merged: if there is a local pass, too, outputs and gradients of queries are written to their rows in one
    pass each. Gradients of keys from the local pass, the stage and other ranks are added in one pass.
    """
    _, sent = plan.kv_moved(window)
    _, _, starts, stops = plan.columns
    waiting, inside = (starts > 0) & (window > 1), (starts == 0) | (stops - starts >= window)
    waits, local, sends = (plan.columns.sums(waiting) > 0, plan.columns.sums(inside) > 0, np.array(sent) > 0)
    copies = 1 * sends + (waits | sends) + 2 * waits + 2 * (waits & local)
    collectives = [2 if any(sent) else 0] * plan.cp_size
    kernel_calls = 2 * (1 * waits + local)
    return {"collectives": collectives, "kernel_calls": kernel_calls.tolist(), "copies": copies.tolist()}
