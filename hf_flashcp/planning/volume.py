"""Exact cost of a plan: tokens, attention pairs, and the KV that must travel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any


Interval = tuple[int, int]


def attention_pairs(start: int, stop: int, window: int | None = None) -> int:
    """Query-key pairs of tokens [start, stop) under a causal mask inside the document (FlashCP eq. 3: W_i), of at most
    `window` keys a query."""
    if window is not None and stop > window:
        inside = max(start, window)
        return (stop - inside) * window + (attention_pairs(start, inside) if start < inside else 0)
    return (stop - start) * (stop + start + 1) // 2


def kv_bytes(tokens: int, num_kv_heads: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """Bytes on the wire for the K and V of `tokens` tokens in one layer: tokens x H_kv x (D_k + D_v) x itemsize."""
    return tokens * num_kv_heads * (key_dim + value_dim) * itemsize


def needed_keys(
    slices: Sequence[Sequence[tuple[int, int, int]]], window: int | None = None
) -> dict[int, dict[int, list[Interval]]]:
    """Which tokens before its own slices each rank attends to.

    Args:
        slices: of each rank, as in [`ShardPlan`].
        window (`int`, *optional*): keys that a query sees, itself included; all before it if `None`.

    Returns:
        `{document: {rank: intervals}}`: disjoint and ascending. Some of their tokens may be the rank's own.
    """
    needed: dict[int, dict[int, list[Interval]]] = defaultdict(dict)
    for rank, rank_slices in enumerate(slices):
        for document, start, _ in rank_slices:
            first = 0 if window is None else max(0, start - window + 1)
            if first == start:
                continue
            intervals = needed[document].setdefault(rank, [])
            if intervals and first <= intervals[-1][1]:
                first, _ = intervals.pop()
            intervals.append((first, start))
    return needed


def overlaps(start: int, stop: int, intervals: Sequence[Interval]) -> list[Interval]:
    """The parts of [start, stop) that lie in `intervals`."""
    return [(max(start, first), min(stop, last)) for first, last in intervals if first < stop and start < last]


def plan_report(
    lengths: Sequence[int],
    cp_size: int,
    slices: Sequence[Sequence[tuple[int, int, int]]],
    window: int | None = None,
) -> dict[str, Any]:
    """See [`ShardPlan.report`]. A token is sent once to every other rank that needs it."""
    tokens, pairs = [0] * cp_size, [0] * cp_size
    for rank, rank_slices in enumerate(slices):
        for _, start, stop in rank_slices:
            tokens[rank] += stop - start
            pairs[rank] += attention_pairs(start, stop, window)
    if window is None:
        received, sent = full_attention_traffic(cp_size, slices)
    else:
        traffic = _traffic(cp_size, slices, window)
        sent = [sum(row) for row in traffic]
        received = [sum(column) for column in zip(*traffic)]
    kv_total = sum(received)
    kv_all_gather = (cp_size - 1) * sum(lengths)
    return {
        "tokens": tokens,
        "pairs": pairs,
        "kv_received": received,
        "kv_sent": sent,
        "grad_received": list(sent),
        "grad_sent": list(received),
        "kv_total": kv_total,
        "kv_all_gather": kv_all_gather,
        "kv_fraction": kv_total / kv_all_gather if kv_all_gather else 0.0,
        "token_imbalance": max(tokens) * cp_size / sum(tokens),
        "pair_imbalance": max(pairs) * cp_size / sum(pairs),
    }


def full_attention_traffic(
    cp_size: int, slices: Sequence[Sequence[tuple[int, int, int]]]
) -> tuple[list[int], list[int]]:
    """KV that each rank receives and sends in the forward of one full-attention layer, in tokens.

    In a time that grows with the number of slices alone: a rank receives, of each document, the tokens before its last
    slice's end that are not its own, and a slice goes to every other rank with a later one (FlashCP eq. 2, exchanged
    exactly).
    """
    pieces: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for rank, rank_slices in enumerate(slices):
        for document, start, stop in rank_slices:
            pieces[document].append((stop, start, rank))
    received, sent = [0] * cp_size, [0] * cp_size
    for of_document in pieces.values():
        if len(of_document) == 1:
            continue
        of_document.sort(reverse=True)
        holders: set[int] = set()
        for stop, start, rank in of_document:
            if rank not in holders:
                holders.add(rank)
                received[rank] += stop
            received[rank] -= stop - start
            sent[rank] += (len(holders) - 1) * (stop - start)
    return received, sent


def kv_traffic(plan, window: int | None = None) -> list[list[int]]:
    """Tokens whose K and V travel from rank to rank in the forward of one layer.

    Args:
        plan ([`ShardPlan`]): a valid plan.
        window (`int`, *optional*): of a sliding-window layer, in tokens; full attention if `None`.

    Returns:
        `list[list[int]]`: `[sender][receiver]`, zero on the diagonal. Rows add up to the report's `kv_sent`, columns
        to its `kv_received`. The backward sends gradients along the transpose.
    """
    return _traffic(plan.cp_size, plan.slices, window)


def _traffic(cp_size, slices, window) -> list[list[int]]:
    traffic = [[0] * cp_size for _ in range(cp_size)]
    needed = needed_keys(slices, window)
    for sender, rank_slices in enumerate(slices):
        row = traffic[sender]
        for document, start, stop in rank_slices:
            for receiver, intervals in needed.get(document, {}).items():
                if receiver != sender:
                    row[receiver] += sum(last - first for first, last in overlaps(start, stop, intervals))
    return traffic
