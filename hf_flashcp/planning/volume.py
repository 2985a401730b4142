"""Exact cost of a plan: tokens, attention pairs, and the KV that must travel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np


Interval = tuple[int, int]


MOST_KEPT = 4
"""Tokens received for each of a rank's own above which KV is fetched again in backward instead of kept."""


def attention_pairs(start: int, stop: int, window: int | None = None) -> int:
    """Query-key pairs of tokens [start, stop) under a causal mask inside the document (FlashCP eq. 3: W_i), of at most
    `window` keys a query."""
    if window is not None and stop > window:
        inside = max(start, window)
        return (stop - inside) * window + (attention_pairs(start, inside) if start < inside else 0)
    return (stop - start) * (stop + start + 1) // 2


def rank_tokens(slices: Sequence[Sequence[tuple[int, int, int]]]) -> list[int]:
    """Tokens of each rank."""
    return [sum(stop - start for _, start, stop in held) for held in slices]


def rank_pairs(slices: Sequence[Sequence[tuple[int, int, int]]]) -> list[int]:
    """Attention pairs of each rank, causal inside documents, without a window (FlashCP eq. 3)."""
    return [sum((stop - start) * (stop + start + 1) // 2 for _, start, stop in held) for held in slices]


def kv_bytes(tokens: int, num_kv_heads: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """Bytes on the wire for the K and V of `tokens` tokens in one layer: tokens x H_kv x (D_k + D_v) x itemsize.

    Args:
        tokens (`int`): that travel, as [`~ShardPlan.report`] counts them.
        num_kv_heads (`int`): H_kv.
        key_dim (`int`): D_k of a head.
        value_dim (`int`): D_v of a head.
        itemsize (`int`): bytes of an element.
    """
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
    offset_groups: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """See [`ShardPlan.report`]."""
    costs = plan_costs(lengths, cp_size, slices, window)
    if window is None or window >= max(lengths):
        collectives, kernel_calls, copies = engine_calls(cp_size, slices, offset_groups)
    else:
        collectives, kernel_calls, copies = _window_calls(slices, window, costs["kv_sent"])
    return {**costs, "collectives": collectives, "kernel_calls": kernel_calls, "copies": copies}


def plan_costs(
    lengths: Sequence[int],
    cp_size: int,
    slices: Sequence[Sequence[tuple[int, int, int]]],
    window: int | None = None,
) -> dict[str, Any]:
    """The report but for what each rank calls: in a time that grows with the number of slices alone, where there is no
    window. A token is sent once to every other rank that needs it."""
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


def key_ranges(
    arrived: Sequence[tuple[int, int, int]], slices: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int]] | None:
    """Where each slice finds the keys before it among what has arrived.

    Args:
        arrived: `(document, start, count)` pieces, one behind the other in a buffer, none straddling a slice.
        slices: `(document, start, stop)` of the rank that they came to.

    Returns:
        `list[tuple[int, int]]`: rows of the buffer for each slice, `(0, 0)` for a slice that needs none; `None` if a
        slice's keys are not in one range.
    """
    pieces: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    offset = 0
    for document, start, count in arrived:
        pieces[document].append((start, offset, count))
        offset += count
    found = []
    for document, start, _ in slices:
        first, last, total = offset, 0, 0
        for piece_start, piece_offset, count in pieces.get(document, ()):
            if piece_start < start:
                first = min(first, piece_offset)
                last = piece_offset + count
                total += count
        if total and last - first != total:
            return None
        found.append((first, last) if total else (0, 0))
    return found


def engine_calls(
    cp_size: int,
    slices: Sequence[Sequence[tuple[int, int, int]]],
    offset_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """`(collectives, kernel_calls, copies)` of each rank in one full-attention layer, forward and backward.

    A copy is one pass over rows, K and V together: packing what is sent and adding the gradients that come home, for
    all stages at once, where the rank sends anything; for each stage that brings something, merging its result, and,
    where the keys of a slice do not arrive in one range ([`key_ranges`]), putting them in document order and their
    gradients back.
    """
    # Of each document its pieces; and which documents travel from rank to rank, in the order in which they arrive.
    pieces: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for rank, rank_slices in enumerate(slices):
        for document, start, stop in rank_slices:
            pieces[document].append((start, stop, rank))
    travels: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(cp_size)]
    for document in sorted(pieces):
        if len(pieces[document]) == 1:
            continue
        receivers, holders = dict.fromkeys((rank for *_, rank in pieces[document]), 0), 0
        for _, _, rank in sorted(pieces[document], reverse=True):
            receivers[rank] |= holders
            holders |= 1 << rank
        for sender, mask in receivers.items():
            for receiver in receivers:
                if receiver != sender and mask >> receiver & 1:
                    travels[receiver][sender].append(document)
    groups = [range(1, cp_size)] if offset_groups is None else offset_groups
    senders = {sender for senders in travels for sender in senders}
    copies = [2 if rank in senders else 0 for rank in range(cp_size)]
    collectives, kernel_calls = 0, [2] * cp_size
    for group in groups:
        exists = False
        for receiver in range(cp_size):
            sources = [sender for sender in sorted(travels[receiver]) if (receiver - sender) % cp_size in group]
            if sources:
                exists = True
                kernel_calls[receiver] += 2
                copies[receiver] += 1 if _arrive_right(receiver, sources, travels, pieces) else 3
        collectives += 2 * exists
    return [collectives] * cp_size, kernel_calls, copies


def _arrive_right(receiver, sources, travels, pieces) -> bool:
    """Whether [`key_ranges`] finds a range for each of the receiver's slices. Only documents from several sources can
    fail: the last slice of a document needs all of its pieces, so these must touch; then the other slices count."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, source in enumerate(sources):
        for document in travels[receiver][source]:
            places[document].append(place)
    arrivals, among = [travels[receiver][source] for source in sources], set(sources)
    for document, where in places.items():
        for place, following in zip(where, where[1:]):
            if following != place + 1 or arrivals[place][-1] != document or arrivals[following][0] != document:
                return False
        if len(where) > 1:
            ordered = sorted(pieces[document])
            own = [(document, start, stop) for start, stop, rank in ordered if rank == receiver]
            arrived = sorted(
                (rank, start, stop) for start, stop, rank in ordered if rank in among and start < own[-1][1]
            )
            if key_ranges([(document, start, stop - start) for _, start, stop in arrived], own) is None:
                return False
    return True


def _window_calls(slices, window: int, sent: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """As [`engine_calls`] for a layer whose window is shorter than some document: there is one stage, and its keys are
    put together from what arrives and what is local, forward and back in two passes each; results are not merged but
    put in their places."""
    collectives = 2 if any(sent) else 0
    kernel_calls, copies = [], []
    for rank_slices, rows in zip(slices, sent):
        waits = window > 1 and any(start > 0 for _, start, _ in rank_slices)
        local = any(start == 0 or stop - start >= window for _, start, stop in rank_slices)
        kernel_calls.append(2 * (waits + local))
        copies.append((2 if rows else 0) + 5 * waits)
    return [collectives] * len(slices), kernel_calls, copies


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


def by_link(traffic: Sequence[Sequence[int]] | np.ndarray, ranks_per_node: int) -> tuple[np.ndarray, np.ndarray]:
    """`(received, sent)`, (2, cp_size) each, of traffic [sender][receiver]: inside the rank's node, and from and to
    other nodes."""
    traffic = np.asarray(traffic)
    node = np.arange(len(traffic)) // ranks_per_node
    inside = node[:, None] == node
    parts = [traffic * which for which in (inside, ~inside)]
    return np.array([part.sum(0) for part in parts]), np.array([part.sum(1) for part in parts])


def _traffic(cp_size, slices, window) -> list[list[int]]:
    if window is None:
        return traffic_matrix(slices).tolist()
    traffic = [[0] * cp_size for _ in range(cp_size)]
    needed = needed_keys(slices, window)
    for sender, rank_slices in enumerate(slices):
        row = traffic[sender]
        for document, start, stop in rank_slices:
            for receiver, intervals in needed.get(document, {}).items():
                if receiver != sender:
                    row[receiver] += sum(last - first for first, last in overlaps(start, stop, intervals))
    return traffic


def traffic_matrix(slices: Sequence[Sequence[tuple[int, int, int]]]) -> np.ndarray:
    """(cp_size, cp_size) int64: what [`kv_traffic`] counts, without a window: a slice goes to every rank that has a
    later one of its document."""
    cp_size = len(slices)
    pieces: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for rank, rank_slices in enumerate(slices):
        for document, start, stop in rank_slices:
            pieces[document].append((start, stop, rank))
    traffic = np.zeros((cp_size, cp_size), dtype=np.int64)
    for of_document in pieces.values():
        if len(of_document) > 1:
            starts, stops, ranks = np.array(of_document).T
            last_start = np.zeros(cp_size, dtype=np.int64)
            np.maximum.at(last_start, ranks, starts)
            np.add.at(traffic, ranks, (stops - starts)[:, None] * (last_start >= stops[:, None]))
    np.fill_diagonal(traffic, 0)
    return traffic
