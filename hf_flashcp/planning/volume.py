"""Exact cost of a plan: tokens, attention pairs, and the KV that must travel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any


def attention_pairs(start: int, stop: int) -> int:
    """Query-key pairs of tokens [start, stop) under a causal mask inside the document (FlashCP eq. 3: W_i)."""
    return (stop - start) * (stop + start + 1) // 2


def kv_bytes(tokens: int, num_kv_heads: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """Bytes on the wire for the K and V of `tokens` tokens in one layer: tokens x H_kv x (D_k + D_v) x itemsize."""
    return tokens * num_kv_heads * (key_dim + value_dim) * itemsize


def document_holders(slices: Sequence[Sequence[tuple[int, int, int]]]) -> dict[int, dict[int, int]]:
    """`{document: {rank: end of the rank's last slice}}`. A rank needs every token before that end."""
    holders: dict[int, dict[int, int]] = defaultdict(dict)
    for rank, rank_slices in enumerate(slices):
        for document, _, stop in rank_slices:
            holders[document][rank] = stop
    return holders


def plan_report(
    lengths: Sequence[int], cp_size: int, slices: Sequence[Sequence[tuple[int, int, int]]]
) -> dict[str, Any]:
    """See [`ShardPlan.report`]. received_r = sum_i (end of r's last slice of i - r's own tokens of i); a token is
    sent once to every other rank whose last slice of the document ends after it (DESIGN: eq. of exact traffic)."""
    tokens, pairs, received, sent = ([0] * cp_size for _ in range(4))
    holders = document_holders(slices)
    for ends in holders.values():
        for rank, end in ends.items():
            received[rank] += end
    for rank, rank_slices in enumerate(slices):
        for document, start, stop in rank_slices:
            tokens[rank] += stop - start
            pairs[rank] += attention_pairs(start, stop)
            for other, end in holders[document].items():
                if other != rank and end > start:
                    sent[rank] += min(stop, end) - start
        received[rank] -= tokens[rank]
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


def kv_traffic(plan) -> list[list[int]]:
    """Tokens whose K and V travel from rank to rank in the forward of one full-attention layer.

    Args:
        plan ([`ShardPlan`]): a valid plan.

    Returns:
        `list[list[int]]`: `[sender][receiver]`, zero on the diagonal. Rows add up to the report's `kv_sent`, columns
        to its `kv_received`. The backward sends gradients along the transpose.
    """
    traffic = [[0] * plan.cp_size for _ in range(plan.cp_size)]
    holders = document_holders(plan.slices)
    for sender, rank_slices in enumerate(plan.slices):
        for document, start, stop in rank_slices:
            for receiver, end in holders[document].items():
                if receiver != sender and end > start:
                    traffic[sender][receiver] += min(stop, end) - start
    return traffic
