"""Algorithm 1 of FlashCP (arXiv 2606.08476): as few documents Per-Doc as balance needs, all others Whole-Doc.

The paper leaves some points open. This implementation decides them as follows:

- Inner split: the rank with the most tokens gives tokens to the rank with the fewest, until one of the two has its
  share. It gives whole documents first, shortest first, because they have the least attention work per token and cause
  no traffic. Then it gives the head of the shortest piece that is longer than the tokens still owed. A head of h
  tokens costs the KV of h tokens and moves h (h + 1) / 2 pairs, no matter which document it is cut from.
- R is `max_imbalance`. It includes the attention work of Per-Doc documents, and so do the loads by which whole
  documents are assigned to ranks.
- If no document is left to be kept whole, all documents are Per-Doc. This plan always exists, although it may exceed R
  when documents are tiny.

A round with P Per-Doc documents builds a complete plan. Rounds that cannot meet the caps are therefore ruled out first
from closed forms: those in which the rank of the longest whole document would have too many pairs, no matter which
heads it gave away.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Iterator

import numpy as np

from ..plan.slices import Slice, Slices, attention_pairs, rank_pairs
from .caps import Caps, assign_shares
from .sharding import assign_whole, give_empty_ranks_a_token, per_doc, per_doc_columns, per_doc_zigzags


def flashcp(caps: Caps) -> Slices:
    """Return the slices of [`algorithm1`], or those of [`per_doc`] if no plan of Algorithm 1 meets the caps."""
    return algorithm1(caps) or per_doc(caps.lengths, caps.cp_size)


def algorithm1(
    caps: Caps, total: float = math.inf, bottleneck: float = math.inf, most_work: float = math.inf
) -> Slices | None:
    """Return the first plan within the caps with 0, 1, 2, ... Per-Doc documents, the longest ones first, or `None`.

    Args:
        caps (`Caps`): the documents, and what a rank may hold of them.
        total (`float`, *optional*): tokens whose KV travels in total. The search ends once further plans are certain
            to reach both this and `bottleneck`.
        bottleneck (`float`, *optional*): tokens whose KV the busiest rank receives or sends.
        most_work (`float`, *optional*): the number of built slices after which the search gives up.
    """
    longest_first = caps.longest_first
    possible = caps.most_pairs * caps.cp_size >= caps.total_pairs and (total > 0 or bottleneck > 0)
    work = 0
    for num_per_doc in promising_rounds(caps, longest_first, total, bottleneck) if possible else ():
        if num_per_doc < len(longest_first):
            work += 2 * caps.cp_size * num_per_doc + len(longest_first)
        if work > most_work:
            break
        if found := _round(caps, longest_first[:num_per_doc], longest_first[num_per_doc:]):
            return found
    return None


def promising_rounds(
    caps: Caps, longest_first: list[int], total: float = math.inf, bottleneck: float = math.inf
) -> Iterator[int]:
    """Yield the numbers of Per-Doc documents with which a plan may meet the caps.

    They end when the traffic of these documents alone reaches both `total` and `bottleneck`.
    """
    lengths, cp_size, least_share = caps.lengths, caps.cp_size, caps.shares[-1]
    split_tokens = split_pairs = split_total = split_bottleneck = 0
    for num_per_doc, document in enumerate(longest_first):
        longest = lengths[document]
        longest_pairs = split_pairs + longest * (longest + 1) // 2
        # The next document always goes to a rank whose load is at most the mean, so a rank above the mean gets no
        # further document. With fewer documents than ranks, empty ranks may also take tokens from it.
        possible = longest_pairs * cp_size <= caps.total_pairs or len(lengths) - num_per_doc < cp_size
        given = max(split_tokens // cp_size + 1 + longest - least_share, 0)
        if possible or longest_pairs - given * (given + 1) // 2 <= caps.most_pairs:
            yield num_per_doc
        # In a zigzag of 2N chunks of at least `chunk` tokens, each rank holds at least the pairs of two such chunks,
        # and rank i receives at least 2N - 2 - i chunks.
        chunk = longest // (2 * cp_size)
        split_tokens += longest
        split_pairs += 2 * cp_size * chunk * chunk + chunk
        split_total += chunk * 3 * cp_size * (cp_size - 1) // 2
        split_bottleneck += chunk * (2 * cp_size - 2)
        if split_total >= total and split_bottleneck >= bottleneck:
            return
    yield len(longest_first)


def _round(caps: Caps, per_doc_documents: list[int], whole_documents: list[int]) -> Slices | None:
    """Return the plan of one round of Algorithm 1, or `None` if it has too many pairs on a rank."""
    lengths, cp_size, most_pairs = caps.lengths, caps.cp_size, caps.most_pairs
    split = np.sort(np.array(per_doc_documents, dtype=np.int64))
    split_pairs, tokens = _zigzag_loads(caps, split)
    pairs = split_pairs.copy()
    pieces: Slices = [[] for _ in range(cp_size)]
    for document, rank in assign_whole(lengths, whole_documents, pairs, tokens):
        length = lengths[document]
        pieces[rank].append(Slice(document, 0, length))
        tokens[rank] += length
        pairs[rank] += length * (length + 1) // 2
    shares = assign_shares(caps.shares, tokens)
    # Ranks above their share only give tokens, and heads of g tokens together have at most g (g + 1) / 2 pairs.
    given = [max(held - share, 0) for held, share in zip(tokens, shares)]
    least_pairs = max(held - attention_pairs(0, tokens_given) for held, tokens_given in zip(pairs, given))
    if least_pairs > most_pairs and len(whole_documents) >= cp_size:
        return None
    equalize_tokens(pieces, tokens, shares)
    loads = map(operator.add, split_pairs, rank_pairs(pieces))
    if min(tokens) and max(loads) > most_pairs:
        return None
    slices = per_doc_columns(lengths, cp_size, documents=split).slices()
    for rank_pieces, rank_slices in zip(pieces, slices):
        rank_slices += rank_pieces
    give_empty_ranks_a_token(slices)
    return None if max(rank_pairs(slices)) > most_pairs else slices


def _zigzag_loads(caps: Caps, documents: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the attention pairs and the tokens of each rank of the [`per_doc`] slices of some documents."""
    of_chunks = np.zeros((2, 2 * caps.cp_size), dtype=np.int64)
    for zigzags in per_doc_zigzags(caps.lengths, caps.cp_size, documents=documents):
        sizes, stops = zigzags.sizes, zigzags.sizes.cumsum(1)
        of_chunks += (sizes * (2 * stops - sizes + 1) // 2).sum(0), sizes.sum(0)
    pairs, tokens = of_chunks[:, : caps.cp_size] + of_chunks[:, : caps.cp_size - 1 : -1]
    return pairs.tolist(), tokens.tolist()


def equalize_tokens(pieces: Slices, tokens: list[int], shares: list[int]) -> None:
    """Move pieces and heads of pieces between ranks, in place, until no rank has more tokens than its share.

    Only whole documents and remainders of whole documents can move. A rank above its share always has enough of them,
    because the ranks' tokens of Per-Doc documents differ by at most one.
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
        _give_heads(pieces[donor], pieces[receiver], owed)


def _give_heads(given: list[Slice], received: list[Slice], owed: int) -> None:
    """Move `owed` tokens from one rank's pieces to another's: whole pieces, shortest first, then a head."""
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
