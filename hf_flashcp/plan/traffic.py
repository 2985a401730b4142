"""Exact counts of the KV that a plan moves between ranks. A token is sent once to every other rank that needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .ranges import Ranges, overlaps, runs
from .slice_table import SliceTable
from .slices import Slice, slices_by_document


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


class NeededKeys(NamedTuple):
    """The tokens that each rank needs, as positions of a [`SliceTable`]: disjoint and ascending for each rank. They
    may include tokens that the rank holds itself."""

    ranks: np.ndarray  # (n,) int64, ascending: the rank that needs each range
    spans: Ranges

    def of_ranks(self, ranks: range) -> NeededKeys:
        """Return what consecutive ranks need."""
        begin, end = np.searchsorted(self.ranks, [ranks.start, ranks.stop])
        return NeededKeys(self.ranks[begin:end], self.spans.select(slice(begin, end)))


def needed_keys(table: SliceTable, window: int | None = None) -> NeededKeys:
    """Return the tokens before its own slices that each rank attends to."""
    ranks, starts, bases = table.ranks, table.spans.starts, table.bases
    first = bases if window is None else np.maximum(bases, starts - window + 1)
    waiting = np.flatnonzero(first < starts)
    ranks, first, last = ranks[waiting], first[waiting], starts[waiting]
    begins, ends = runs((ranks[1:] != ranks[:-1]) | (first[1:] > last[:-1]), len(ranks))
    return NeededKeys(ranks[begins], Ranges(first[begins], last[ends]))


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
        table = SliceTable.of(slices)
        needed = needed_keys(table, window)
        for receiver in range(cp_size):
            found = overlaps(needed.of_ranks(range(receiver, receiver + 1)).spans, table.by_position.spans)
            senders = table.by_position.ranks[found.second]
            traffic[:, receiver] = np.bincount(senders, found.common.lengths, cp_size)
    np.fill_diagonal(traffic, 0)
    return traffic


def by_link(traffic: np.ndarray, ranks_per_node: int) -> tuple[np.ndarray, np.ndarray]:
    """Split traffic [sender][receiver] into `(received, sent)` tokens, (2, cp_size) each: inside and between nodes."""
    node = np.arange(len(traffic)) // ranks_per_node
    inside = node[:, None] == node
    parts = [traffic * which for which in (inside, ~inside)]
    return np.array([part.sum(0) for part in parts]), np.array([part.sum(1) for part in parts])
