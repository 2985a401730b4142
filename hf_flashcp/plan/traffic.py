"""Exact counts of the KV that a plan moves between ranks. A token is sent once to every other rank that needs it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from .slices import Slice, slices_by_document


Interval = tuple[int, int]
"""Tokens [start, stop) of a document."""

MOST_KEPT = 4
"""The most tokens that a rank may receive per token of its own for received KV to be kept until backward by default.
Above it, KV is fetched again in backward."""


def kv_bytes(tokens: int, num_kv_heads: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """Return the bytes of the K and V of some tokens in one layer: tokens x H_kv x (D_k + D_v) x itemsize.

    Args:
        tokens (`int`): number of tokens that travel, as [`~ShardPlan.report`] counts them.
        num_kv_heads (`int`): H_kv, number of KV heads.
        key_dim (`int`): D_k, elements of a key head.
        value_dim (`int`): D_v, elements of a value head.
        itemsize (`int`): bytes per element.
    """
    return tokens * num_kv_heads * (key_dim + value_dim) * itemsize


def needed_keys(slices: Sequence[Sequence[Slice]], window: int | None = None) -> dict[int, dict[int, list[Interval]]]:
    """Return the tokens before its own slices that each rank attends to, as `{document: {rank: intervals}}`.

    The intervals are disjoint and ascending. They may include tokens that the rank holds itself.
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
    """Return the parts of [start, stop) that lie in `intervals`."""
    return [(max(start, first), min(stop, last)) for first, last in intervals if first < stop and start < last]


def full_attention_traffic(slices: Sequence[Sequence[Slice]]) -> tuple[list[int], list[int]]:
    """Return `(received, sent)`, the tokens whose KV each rank receives and sends in a full-attention layer's forward.

    Of each document a rank receives the tokens before the end of its last slice, except its own, and each slice is
    sent to every other rank that holds a later one (FlashCP eq. 2, with an exact exchange). The time that this takes
    depends only on the number of slices.
    """
    received, sent = [0] * len(slices), [0] * len(slices)
    for held in slices_by_document(slices).values():
        if len(held) == 1:
            continue
        holders: set[int] = set()
        for start, stop, rank in reversed(held):
            if rank not in holders:
                holders.add(rank)
                received[rank] += stop
            received[rank] -= stop - start
            sent[rank] += (len(holders) - 1) * (stop - start)
    return received, sent


def traffic_matrix(slices: Sequence[Sequence[Slice]], window: int | None = None) -> np.ndarray:
    """Return the tokens whose K and V travel in a layer's forward, (cp_size, cp_size) int64, [sender][receiver]."""
    cp_size = len(slices)
    traffic = np.zeros((cp_size, cp_size), dtype=np.int64)
    if window is None:
        # Each slice is sent to every rank that holds a later slice of its document.
        for held in slices_by_document(slices).values():
            if len(held) > 1:
                starts, stops, ranks = np.array(held).T
                last_start = np.zeros(cp_size, dtype=np.int64)
                np.maximum.at(last_start, ranks, starts)
                np.add.at(traffic, ranks, (stops - starts)[:, None] * (last_start >= stops[:, None]))
    else:
        needed = needed_keys(slices, window)
        for sender, rank_slices in enumerate(slices):
            for document, start, stop in rank_slices:
                for receiver, intervals in needed.get(document, {}).items():
                    traffic[sender, receiver] += sum(last - first for first, last in overlaps(start, stop, intervals))
    np.fill_diagonal(traffic, 0)
    return traffic


def by_link(traffic: np.ndarray, ranks_per_node: int) -> tuple[np.ndarray, np.ndarray]:
    """Split traffic [sender][receiver] into `(received, sent)` tokens, (2, cp_size) each: inside and between nodes."""
    node = np.arange(len(traffic)) // ranks_per_node
    inside = node[:, None] == node
    parts = [traffic * which for which in (inside, ~inside)]
    return np.array([part.sum(0) for part in parts]), np.array([part.sum(1) for part in parts])
