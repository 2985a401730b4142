"""The shardings that strategies are made of: whole documents, zigzag over all ranks, zigzag of the packed row.

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
from collections.abc import Iterable

from ..plan.slices import Lengths, Slice, Slices, attention_pairs


def whole_doc(lengths: Lengths, cp_size: int) -> Slices:
    """Documents stay whole, so no KV travels. Only where documents are fewer than ranks is one cut: an empty rank
    takes the next single token from the head of the longest piece."""
    slices: Slices = [[] for _ in range(cp_size)]
    for document, rank in assign_whole(lengths, range(len(lengths)), [0] * cp_size, [0] * cp_size):
        slices[rank].append(Slice(document, 0, lengths[document]))
    give_empty_ranks_a_token(slices)
    return slices


def assign_whole(
    lengths: Lengths, documents: Iterable[int], pairs: list[int], tokens: list[int]
) -> list[tuple[int, int]]:
    """`(document, rank)`, the longest document first, each to the rank with the fewest attention pairs so far (ties:
    tokens, then rank). `pairs` and `tokens` are what the ranks have already."""
    loads = list(zip(pairs, tokens, range(len(pairs))))
    heapq.heapify(loads)
    assigned = []
    for document in sorted(documents, key=lambda document: (-lengths[document], document)):
        rank_pairs, rank_tokens, rank = loads[0]
        length = lengths[document]
        heapq.heapreplace(loads, (rank_pairs + attention_pairs(0, length), rank_tokens + length, rank))
        assigned.append((document, rank))
    return assigned


def give_empty_ranks_a_token(slices: Slices) -> None:
    """Each rank without tokens takes the first one of the longest piece on any rank, in place; where all pieces are
    single tokens, one of a rank with several."""
    for rank_slices in slices:
        if not rank_slices:
            piece, donor = max(
                ((piece, pieces) for pieces in slices for piece in pieces),
                key=lambda held: (held[0].tokens, held[0].tokens == 1 and len(held[1]) > 1, -held[0].document),
            )
            document, start, stop = piece
            place = donor.index(piece)
            donor[place : place + 1] = [Slice(document, start + 1, stop)] if piece.tokens > 1 else []
            rank_slices.append(Slice(document, start, start + 1))


def per_doc(
    lengths: Lengths, cp_size: int, rotate_ranks: bool = False, documents: Iterable[int] | None = None
) -> Slices:
    """Every document, or those of `documents`, in 2N near-equal chunks, rank i takes chunks i and 2N-1-i (WLB-LLM's
    per-document sharding).

    The `length mod 2N` tokens left over go one each to the next chunks in the order of the zigzag, and the place in
    that order is carried on from document to document: no padding, and ranks' tokens stay equal within one. With
    `rotate_ranks` document d's rank labels are shifted by d, so that receiving (the holder of last chunks) and sending
    (the holder of first chunks) do not always fall on the same rank.
    """
    chunks = 2 * cp_size
    slices: Slices = [[] for _ in range(cp_size)]
    next_extra = 0
    for document in range(len(lengths)) if documents is None else documents:
        length = lengths[document]
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
                slices[rank].append(Slice(document, start, start + size))
            start += size
    return slices


def per_seq(lengths: Lengths, cp_size: int) -> Slices:
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
            slices[rank].append(Slice(document, start - document_start, piece_stop - document_start))
            start = piece_stop
            if start == document_stop:
                document, document_start = document + 1, document_stop
    return slices
