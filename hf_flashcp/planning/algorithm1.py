"""Algorithm 1 of FlashCP (arXiv 2606.08476): as few Per-Doc documents as the balance needs, the rest Whole-Doc.

What the paper leaves open, and what is done here:

- The inner split. The rank with the most tokens gives to the rank with the fewest, as many tokens as brings one of the
  two to its share: first whole documents, shortest first (they carry the least attention work a token and cost no
  traffic), then the head of the shortest piece that is longer than what is still owed (a head of h tokens costs the
  KV of h tokens and moves h (h + 1) / 2 pairs, whichever document it is cut from).
- R is `max_imbalance`. The attention work of the Per-Doc documents counts in it, and in the loads to which whole
  documents are assigned.
- No document left: everything is Per-Doc, which is always possible, even where that too exceeds R (tiny documents).
"""

from __future__ import annotations

import heapq
import math

from ..plan.slices import Lengths, Slice, Slices, attention_pairs, rank_pairs, rank_tokens
from .sharding import assign_whole, give_empty_ranks_a_token, per_doc


def flashcp(lengths: Lengths, cp_size: int, max_imbalance: float, max_token_imbalance: float) -> Slices:
    """Slices of every rank with tokens and attention pairs under the caps (max / mean); tokens are equal within one
    for `max_token_imbalance` 1.0. Restarts with one more Per-Doc document, the longest left, until the pairs fit."""
    longest_first = sorted(range(len(lengths)), key=lambda document: (-lengths[document], document))
    most_pairs = max_imbalance * sum(attention_pairs(0, length) for length in lengths) / cp_size
    for num_per_doc in range(len(lengths)):
        split, whole = sorted(longest_first[:num_per_doc]), longest_first[num_per_doc:]
        slices = per_doc(lengths, cp_size, documents=split)
        pairs, tokens = rank_pairs(slices), rank_tokens(slices)
        pieces: Slices = [[] for _ in range(cp_size)]
        for document, rank in assign_whole(lengths, whole, pairs, tokens):
            pieces[rank].append(Slice(document, 0, lengths[document]))
            tokens[rank] += lengths[document]
        equalize_tokens(pieces, tokens, token_shares(tokens, max_token_imbalance))
        for rank_pieces, rank_slices in zip(pieces, slices):
            rank_slices += rank_pieces
        give_empty_ranks_a_token(slices)
        if max(rank_pairs(slices)) <= most_pairs:
            return slices
    return per_doc(lengths, cp_size)


def token_shares(tokens: list[int], max_token_imbalance: float) -> list[int]:
    """The most tokens each rank may hold. Where they cannot be equal, the fullest ranks keep one more."""
    total, cp_size = sum(tokens), len(tokens)
    cap = math.floor(min(max_token_imbalance * total / cp_size, total))
    if cap > total // cp_size:
        return [cap] * cp_size
    fullest = sorted(range(cp_size), key=lambda rank: (-tokens[rank], rank))
    with_one_more = set(fullest[: total % cp_size])
    return [total // cp_size + (rank in with_one_more) for rank in range(cp_size)]


def equalize_tokens(pieces: Slices, tokens: list[int], shares: list[int]) -> None:
    """Moves pieces and heads of pieces until no rank has more than its share, in place.

    Only whole documents and what is left of them can move; a rank above its share always has enough of them, since the
    Per-Doc documents' tokens are equal within one on all ranks.
    """
    above = [(share - held, rank) for rank, (held, share) in enumerate(zip(tokens, shares)) if held > share]
    below = [(held - share, rank) for rank, (held, share) in enumerate(zip(tokens, shares)) if held < share]
    heapq.heapify(above)
    heapq.heapify(below)
    while above:
        (surplus, donor), (deficit, receiver) = heapq.heappop(above), heapq.heappop(below)
        owed = -max(surplus, deficit)
        tokens[donor] -= owed
        tokens[receiver] += owed
        if surplus + owed:
            heapq.heappush(above, (surplus + owed, donor))
        if deficit + owed:
            heapq.heappush(below, (deficit + owed, receiver))
        by_length = sorted(pieces[donor], key=lambda piece: (piece[2] - piece[1], piece))
        for document, start, stop in by_length:
            if not owed:
                break
            moved = min(owed, stop - start)
            pieces[donor].remove(Slice(document, start, stop))
            if moved < stop - start:
                pieces[donor].append(Slice(document, start + moved, stop))
            pieces[receiver].append(Slice(document, start, start + moved))
            owed -= moved
        assert not owed
