"""Sharding strategies: from document lengths to a `ShardPlan`.

How one document of eight tokens lies on two ranks (queries down, keys across, the digit is the query's rank):

    per_doc             whole_doc
    0 . . . . . . .     0 . . . . . . .
    0 0 . . . . . .     0 0 . . . . . .
    1 1 1 . . . . .     0 0 0 . . . . .
    1 1 1 1 . . . .     0 0 0 0 . . . .      no KV travels; other documents
    1 1 1 1 1 . . .     0 0 0 0 0 . . .      have to balance the ranks
    1 1 1 1 1 1 . .     0 0 0 0 0 0 . .
    0 0 0 0 0 0 0 .     0 0 0 0 0 0 0 .
    0 0 0 0 0 0 0 0     0 0 0 0 0 0 0 0
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from ..errors import PlanError
from .plan import ShardPlan, Slice, check_lengths
from .volume import attention_pairs


Slices = list[list[Slice]]


def _whole_doc(lengths: tuple[int, ...], cp_size: int) -> Slices:
    """Longest document first, to the rank with the fewest attention pairs so far (ties: tokens, then rank).

    Documents stay whole, so no KV travels. Only where documents are fewer than ranks is one cut: an empty rank
    takes the next single token from the head of the document with most tokens left.
    """
    slices: Slices = [[] for _ in range(cp_size)]
    loads = [(0, 0, rank) for rank in range(cp_size)]
    owner = {}
    for document in sorted(range(len(lengths)), key=lambda document: (-lengths[document], document)):
        length = lengths[document]
        pairs, tokens, rank = heapq.heappop(loads)
        heapq.heappush(loads, (pairs + attention_pairs(0, length), tokens + length, rank))
        owner[document] = rank
    heads = [0] * len(lengths)
    for rank in sorted(set(range(cp_size)) - set(owner.values())):
        document = max(range(len(lengths)), key=lambda document: (lengths[document] - heads[document], -document))
        slices[rank].append((document, heads[document], heads[document] + 1))
        heads[document] += 1
    for document, rank in owner.items():
        slices[rank].append((document, heads[document], lengths[document]))
    return slices


def _per_doc(lengths: tuple[int, ...], cp_size: int, rotate_ranks: bool = False) -> Slices:
    """Every document in 2N near-equal chunks, rank i takes chunks i and 2N-1-i (WLB-LLM's per-document sharding).

    The `length mod 2N` tokens left over go one each to the next chunks in the order of the zigzag, and the place in
    that order is carried on from document to document: no padding, and ranks' tokens stay equal within one.
    With `rotate_ranks` document d's rank labels are shifted by d, so that receiving (the holder of last chunks) and
    sending (the holder of first chunks) do not always fall on the same rank.
    """
    chunks = 2 * cp_size
    slices: Slices = [[] for _ in range(cp_size)]
    next_extra = 0
    for document, length in enumerate(lengths):
        shift = document % cp_size if rotate_ranks else 0
        base, extra = divmod(length, chunks)
        sizes = [base] * chunks
        for turn in range(next_extra, next_extra + extra):
            # The turn names a rank, so that tokens stay equal whatever the shift; it falls on the chunk of the
            # document that this rank holds in this half of the zigzag.
            turn %= chunks
            if turn < cp_size:
                chunk = (turn - shift) % cp_size
            else:
                chunk = chunks - 1 - (chunks - 1 - turn - shift) % cp_size
            sizes[chunk] += 1
        next_extra = (next_extra + extra) % chunks
        start = 0
        for chunk, size in enumerate(sizes):
            if size:
                rank = (min(chunk, chunks - 1 - chunk) + shift) % cp_size
                slices[rank].append((document, start, start + size))
            start += size
    return slices


def _per_seq(lengths: tuple[int, ...], cp_size: int) -> Slices:
    """The whole packed row in 2N near-equal chunks, rank i takes chunks i and 2N-1-i, documents ignored (Llama 3)."""
    total = sum(lengths)
    chunks = 2 * cp_size
    base, extra = divmod(total, chunks)
    # One spare token to each rank's first chunk, then to the last chunks from the end: ranks stay equal within one.
    with_extra = {turn if turn < cp_size else chunks - 1 - (turn - cp_size) for turn in range(extra)}
    slices: Slices = [[] for _ in range(cp_size)]
    document, document_start, start = 0, 0, 0
    for chunk in range(chunks):
        stop = start + base + (chunk in with_extra)
        while start < stop:
            document_stop = document_start + lengths[document]
            piece_stop = min(stop, document_stop)
            rank = min(chunk, chunks - 1 - chunk)
            slices[rank].append((document, start - document_start, piece_stop - document_start))
            start = piece_stop
            if start == document_stop:
                document, document_start = document + 1, document_stop
    return slices


_STRATEGIES: dict[str, Callable[[tuple[int, ...], int], Slices]] = {
    "whole_doc": _whole_doc,
    "per_doc": _per_doc,
    "per_seq": _per_seq,
}
STRATEGIES = tuple(_STRATEGIES)
"""Names that `plan_documents` takes as `strategy`."""

DEFAULT_STRATEGY = "per_doc"


def plan_documents(
    lengths: Iterable[int], cp_size: int, *, strategy: str = DEFAULT_STRATEGY, rotate_ranks: bool = False
) -> ShardPlan:
    """Assigns the tokens of packed documents to context-parallel ranks.

    Pure and deterministic: every rank that plans the same lengths gets the same plan.

    Args:
        lengths (`Iterable[int]`): tokens of each document in packed order; any positive integers, no divisibility.
        cp_size (`int`): number of context-parallel ranks; the batch needs at least that many tokens.
        strategy (`str`, *optional*, defaults to `"per_doc"`):
            - `"whole_doc"`: documents stay whole, balanced by attention work, no KV travels. Ranks may hold
              unequal tokens.
            - `"per_doc"`: every document is split over all ranks (zigzag): tokens and work balanced, most KV travels.
            - `"per_seq"`: the packed row is split over all ranks as if it were one document (Llama 3): tokens
              balanced, work only for one long document.
        rotate_ranks (`bool`, *optional*, defaults to `False`):
            With `"per_doc"`, shift the rank labels by one from document to document. The total traffic stays, the
            largest rank's share of it falls.

    Returns:
        `ShardPlan`: a validated partition.

    Raises:
        PlanError: no documents, an empty document, fewer tokens than ranks, an unknown strategy.
    """
    lengths, cp_size = check_lengths(lengths, cp_size)
    if strategy not in _STRATEGIES:
        raise PlanError(f"Unknown strategy {strategy!r}: choose one of {', '.join(map(repr, STRATEGIES))}.")
    if rotate_ranks and strategy != "per_doc":
        raise PlanError(f"rotate_ranks is an option of the strategy 'per_doc', not of {strategy!r}: leave it out.")
    options = {"rotate_ranks": True} if rotate_ranks else {}
    return ShardPlan(lengths, cp_size, _STRATEGIES[strategy](lengths, cp_size, **options)).validate()
