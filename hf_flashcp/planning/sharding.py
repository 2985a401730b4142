"""Basic ways to shard documents: whole, each document in a zigzag over all ranks, or the packed row in a zigzag.

A document of eight tokens on two ranks (queries down, keys across; each digit is the rank of the query):

    per_doc             whole_doc
    0 . . . . . . .     0 . . . . . . .
    0 0 . . . . . .     0 0 . . . . . .
    1 1 1 . . . . .     0 0 0 . . . . .
    1 1 1 1 . . . .     0 0 0 0 . . . .      no KV travels, but other documents
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
    """Place whole documents on ranks, so that no KV travels.

    Documents are cut only if there are fewer documents than ranks: each empty rank then takes a single token from the
    head of the longest piece.
    """
    slices: Slices = [[] for _ in range(cp_size)]
    for document, rank in assign_whole(lengths, range(len(lengths)), [0] * cp_size, [0] * cp_size):
        slices[rank].append(Slice(document, 0, lengths[document]))
    give_empty_ranks_a_token(slices)
    return slices


def assign_whole(
    lengths: Lengths, documents: Iterable[int], pairs: list[int], tokens: list[int]
) -> list[tuple[int, int]]:
    """Assign whole documents to ranks, longest first, each to the rank with the fewest attention pairs so far.

    Ties go to the rank with fewer tokens, then to the lower rank. `pairs` and `tokens` are those that each rank holds
    already. The result has a `(document, rank)` for each document.
    """
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
    """Move one token to each rank without tokens, in place: the first token of the longest piece on any rank.

    If all pieces are single tokens, it comes from a rank that holds several.
    """
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
    """Split each document, or each of `documents`, over all ranks in a zigzag (WLB-LLM's per-document sharding).

    A document is cut into 2N chunks of nearly equal length, and rank i takes chunks i and 2N-1-i. The `length mod 2N`
    tokens that are left over go to one chunk each, in the order of the zigzag, and the next document continues where
    the last one ended. So no padding is needed, and ranks' tokens differ by at most one.

    The rank with the last chunk of a document receives the most KV, and the rank with its first chunk sends the most.
    With `rotate_ranks` the ranks of document d are shifted by d, so that these are not always the same ranks.
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
            # The turn selects a rank, so that ranks' tokens stay equal for any shift. The token goes to the chunk that
            # this rank holds in this half of the zigzag.
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
    """Split the packed row over all ranks in a zigzag, ignoring documents, as Llama 3 did.

    The row is cut into 2N chunks of nearly equal length, and rank i takes chunks i and 2N-1-i.
    """
    total = sum(lengths)
    chunks = 2 * cp_size
    base, extra = divmod(total, chunks)
    # Spare tokens go to the ranks' first chunks, then to their last chunks from the end, so that the ranks' tokens
    # differ by at most one.
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
