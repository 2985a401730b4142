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
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..plan.slice_table import SliceColumns
from ..plan.slices import Lengths, Slice, Slices, attention_pairs


MOST_CHUNKS = 1 << 18
"""The most chunks of documents that are laid out together, to bound the memory that this takes."""


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
    empty = [held for held in slices if not held]
    if not empty:
        return
    pieces = [
        (-piece.tokens, piece.document, rank, place)
        for rank, held in enumerate(slices)
        for place, piece in enumerate(held)
    ]
    heapq.heapify(pieces)
    for rank_slices in empty:
        left, _, rank, place = pieces[0]
        if left < -1:
            donor, (document, start, stop) = slices[rank], slices[rank][place]
            donor[place] = Slice(document, start + 1, stop)
            heapq.heapreplace(pieces, (left + 1, document, rank, place))
        else:
            piece, donor = max(
                ((piece, held) for held in slices for piece in held),
                key=lambda found: (len(found[1]) > 1, -found[0].document),
            )
            document, start, _ = piece
            donor.remove(piece)
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
    chosen = np.arange(len(lengths)) if documents is None else np.fromiter(documents, np.int64)
    return per_doc_columns(lengths, cp_size, rotate_ranks, chosen).slices()


def per_doc_columns(
    lengths: Lengths, cp_size: int, rotate_ranks: bool = False, documents: np.ndarray | None = None
) -> SliceColumns:
    """Return the slices of [`per_doc`] as arrays."""
    parts: list[list[np.ndarray]] = []
    for zigzags in per_doc_zigzags(lengths, cp_size, rotate_ranks, documents):
        rows, chunks = np.nonzero(zigzags.sizes)
        stops = zigzags.sizes.cumsum(1)[rows, chunks]
        sizes = zigzags.sizes[rows, chunks]
        parts.append([zigzags.ranks[rows, chunks], zigzags.documents[rows], stops - sizes, stops])
    empty = [np.zeros(0, dtype=np.int64)] * 4
    return SliceColumns.by_rank(cp_size, *map(np.concatenate, zip(*(parts or [empty]))))


class Zigzags(NamedTuple):
    """Documents that are cut into chunks, which ranks hold in a zigzag."""

    documents: np.ndarray  # (n,) int64
    sizes: np.ndarray  # (n, 2 x cp_size) int64, tokens of each chunk
    ranks: np.ndarray  # (n, 2 x cp_size) int64, the rank of each chunk


def per_doc_zigzags(
    lengths: Lengths, cp_size: int, rotate_ranks: bool = False, documents: np.ndarray | None = None
) -> Iterator[Zigzags]:
    """Yield the zigzags of [`per_doc`], of about [`MOST_CHUNKS`] chunks at a time."""
    chunks = np.arange(2 * cp_size)
    every = np.arange(len(lengths)) if documents is None else documents
    bases, extras = np.divmod(np.array(lengths)[every], len(chunks))
    nexts = (extras.cumsum() - extras) % len(chunks)
    step = max(MOST_CHUNKS // len(chunks), 1)
    for begin in range(0, len(every), step):
        some = slice(begin, begin + step)
        shifts = every[some, None] % cp_size if rotate_ranks else np.zeros((1, 1), dtype=np.int64)
        ranks = (np.minimum(chunks, chunks[::-1]) + shifts) % cp_size
        # A spare token goes to a turn, which selects a rank, so that ranks' tokens stay equal for any shift, and the
        # chunk that this rank holds in this half of the zigzag.
        turns = np.where(chunks < cp_size, ranks, len(chunks) - 1 - ranks)
        spare = (turns - nexts[some, None]) % len(chunks) < extras[some, None]
        sizes = bases[some, None] + spare
        yield Zigzags(every[some], sizes, np.broadcast_to(ranks, sizes.shape))


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
