"""Algorithm 1 of FlashCP (arXiv 2606.08476): as few Per-Doc documents as the balance needs, the rest Whole-Doc.

What the paper leaves open, and what is done here:

- The inner split. The rank with the most tokens gives to the rank with the fewest, as many tokens as brings one of the
  two to its share: first whole documents, shortest first (they carry the least attention work per token and cost no
  traffic), then the head of the shortest piece that is longer than what is still owed (a head of h tokens costs the
  KV of h tokens and moves h (h + 1) / 2 pairs, whichever document it is cut from).
- R is `max_imbalance`. The attention work of the Per-Doc documents counts in it, and in the loads to which whole
  documents are assigned.
- No document left: everything is Per-Doc, which is always possible, even where that too exceeds R (tiny documents).

A round with P Per-Doc documents builds a whole plan, so rounds that cannot meet the caps are ruled out from closed
forms first: the rank of the longest whole document would have too many pairs whatever heads it gave away.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from ..plan.slices import Slice, Slices, attention_pairs, rank_pairs, rank_tokens
from .caps import Caps, assign_shares
from .sharding import assign_whole, give_empty_ranks_a_token, per_doc


def flashcp(caps: Caps) -> Slices:
    """The slices of [`algorithm1`], or of [`per_doc`] where no plan of Algorithm 1 meets the caps."""
    return algorithm1(caps) or per_doc(caps.lengths, caps.cp_size)


def algorithm1(
    caps: Caps, total: float = math.inf, bottleneck: float = math.inf, most_work: float = math.inf
) -> Slices | None:
    """The first plan within the caps with 0, 1, 2, ... Per-Doc documents, the longest first, or `None`.

    The search ends at plans that certainly reach both `total` and `bottleneck` (tokens whose KV travels in all, and to
    or from the busiest rank), and is given up after `most_work` slices that were built.
    """
    longest_first = sorted(range(len(caps.lengths)), key=lambda document: (-caps.lengths[document], document))
    possible = caps.most_pairs * caps.cp_size >= caps.total_pairs and (total > 0 or bottleneck > 0)
    work = 0
    for num_per_doc in _promising_rounds(caps, longest_first, total, bottleneck) if possible else ():
        if num_per_doc < len(longest_first):
            work += 2 * caps.cp_size * num_per_doc + len(longest_first)
        if work > most_work:
            break
        if found := _round(caps, longest_first[:num_per_doc], longest_first[num_per_doc:]):
            return found
    return None


def _promising_rounds(caps: Caps, longest_first: list[int], total: float, bottleneck: float) -> Iterator[int]:
    """Numbers of Per-Doc documents that may meet the caps, while these alone stay below `total` or `bottleneck`."""
    lengths, cp_size, least_share = caps.lengths, caps.cp_size, caps.shares[-1]
    split_tokens = split_pairs = split_total = split_bottleneck = 0
    for num_per_doc, document in enumerate(longest_first):
        longest = lengths[document]
        longest_pairs = split_pairs + longest * (longest + 1) // 2
        # Loads are never above the mean where the next document goes, so nothing joins a rank above the mean. With
        # fewer documents than ranks, empty ranks may take tokens off it besides.
        possible = longest_pairs * cp_size <= caps.total_pairs or len(lengths) - num_per_doc < cp_size
        given = max(split_tokens // cp_size + 1 + longest - least_share, 0)
        if possible or longest_pairs - given * (given + 1) // 2 <= caps.most_pairs:
            yield num_per_doc
        # A zigzag of 2N chunks of at least `chunk` tokens: each rank holds at least the pairs of two such chunks, rank
        # i receives at least 2N - 2 - i of them.
        chunk = longest // (2 * cp_size)
        split_tokens += longest
        split_pairs += 2 * cp_size * chunk * chunk + chunk
        split_total += chunk * 3 * cp_size * (cp_size - 1) // 2
        split_bottleneck += chunk * (2 * cp_size - 2)
        if split_total >= total and split_bottleneck >= bottleneck:
            return
    yield len(longest_first)


def _round(caps: Caps, per_doc_documents: list[int], whole_documents: list[int]) -> Slices | None:
    """One round of Algorithm 1, or `None` if its plan has too many pairs on a rank."""
    lengths, cp_size, most_pairs = caps.lengths, caps.cp_size, caps.most_pairs
    slices = per_doc(lengths, cp_size, documents=sorted(per_doc_documents))
    pairs, tokens = rank_pairs(slices), rank_tokens(slices)
    pieces: Slices = [[] for _ in range(cp_size)]
    for document, rank in assign_whole(lengths, whole_documents, pairs, tokens):
        length = lengths[document]
        pieces[rank].append(Slice(document, 0, length))
        tokens[rank] += length
        pairs[rank] += length * (length + 1) // 2
    shares = assign_shares(caps.shares, tokens)
    # Ranks above their share only give, and heads of together g tokens have at most g (g + 1) / 2 pairs.
    given = [max(held - share, 0) for held, share in zip(tokens, shares)]
    least_pairs = max(held - attention_pairs(0, tokens_given) for held, tokens_given in zip(pairs, given))
    if least_pairs > most_pairs and len(whole_documents) >= cp_size:
        return None
    equalize_tokens(pieces, tokens, shares)
    for rank_pieces, rank_slices in zip(pieces, slices):
        rank_slices += rank_pieces
    give_empty_ranks_a_token(slices)
    return None if max(rank_pairs(slices)) > most_pairs else slices


def equalize_tokens(pieces: Slices, tokens: list[int], shares: list[int]) -> None:
    """Moves pieces and heads of pieces until no rank has more than its share, in place. Only whole documents and what
    is left of them can move; a rank above its share always has enough of them, since the Per-Doc documents' tokens are
    equal within one on all ranks."""
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
        _give_heads(pieces[donor], pieces[receiver], owed)


def _give_heads(given: list[Slice], received: list[Slice], owed: int) -> None:
    """Moves `owed` tokens from one rank's pieces to another's: whole pieces, the shortest first, then a head."""
    for piece in sorted(given, key=lambda piece: (piece.stop - piece.start, piece)):
        if not owed:
            break
        document, start, stop = piece
        moved = min(owed, stop - start)
        given.remove(piece)
        if moved < stop - start:
            given.append(Slice(document, start + moved, stop))
        received.append(Slice(document, start, start + moved))
        owed -= moved
    assert not owed
