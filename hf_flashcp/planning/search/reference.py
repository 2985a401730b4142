"""Algorithm 1's plan for the strategy "search" to be measured against, without building what cannot matter.

[`algorithm1.flashcp`] starts over with one more Per-Doc document until the caps are met. Most of those attempts can be
ruled out from closed forms: the rank of the longest whole document has too many pairs whatever heads it gives away, or
the Per-Doc documents alone already cost more KV than the plan at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...plan.slices import Slice, Slices, rank_pairs, rank_tokens
from ..algorithm1 import equalize_tokens, token_shares
from ..sharding import assign_whole, give_empty_ranks_a_token, per_doc


MOST_WORK = 4_000_000
"""Slices that may be built in rounds of Algorithm 1 before it is left alone. Only thousands of documents on hundreds
of ranks get there, where Algorithm 1 would take minutes."""


def better_algorithm1(
    lengths: Sequence[int],
    cp_size: int,
    most_pairs: float,
    max_token_imbalance: float,
    total: float,
    bottleneck: float,
) -> Slices | None:
    """What `flashcp` returns, or `None` if that is above `most_pairs`, or certainly needs at least `total` KV in all
    and `bottleneck` on a rank, or is too much work to find."""
    lengths = tuple(lengths)
    num_tokens = sum(lengths)
    longest_first = sorted(range(len(lengths)), key=lambda document: (-lengths[document], document))
    mean_pairs = sum(length * (length + 1) // 2 for length in lengths) / cp_size
    least_share = token_shares([num_tokens] + [0] * (cp_size - 1), max_token_imbalance)[-1]
    split_tokens = split_pairs = split_total = split_bottleneck = work = 0
    if most_pairs < math.ceil(mean_pairs):
        return None
    for num_per_doc in range(len(lengths) + 1):
        if split_total >= total and split_bottleneck >= bottleneck:
            return None
        if num_per_doc == len(lengths):
            break
        longest = lengths[longest_first[num_per_doc]]
        longest_pairs = split_pairs + longest * (longest + 1) // 2
        # Loads are never above the mean where the next document goes, so nothing joins a rank above the mean.
        given = max(split_tokens // cp_size + 1 + longest - least_share, 0)
        # With fewer documents than ranks, empty ranks may take tokens off it besides.
        possible = longest_pairs <= mean_pairs or len(lengths) - num_per_doc < cp_size
        if possible or longest_pairs - given * (given + 1) // 2 <= most_pairs:
            work += 2 * cp_size * num_per_doc + len(lengths)
            if work > MOST_WORK:
                return None
            slices = _attempt(lengths, cp_size, longest_first, num_per_doc, most_pairs, max_token_imbalance)
            if slices is not None:
                return slices
        # A zigzag of 2N chunks of at least `chunk` tokens: each rank holds at least the pairs of two such chunks, rank
        # i receives at least 2N - 2 - i of them.
        chunk = longest // (2 * cp_size)
        split_tokens += longest
        split_pairs += 2 * cp_size * chunk * chunk + chunk
        split_total += chunk * 3 * cp_size * (cp_size - 1) // 2
        split_bottleneck += chunk * (2 * cp_size - 2)
    slices = per_doc(lengths, cp_size)
    if max(rank_pairs(slices)) > most_pairs:
        return None
    return slices


def _attempt(lengths, cp_size, longest_first, num_per_doc, most_pairs, max_token_imbalance) -> Slices | None:
    """One round of `flashcp`, given up as soon as it cannot meet `most_pairs`."""
    slices = per_doc(lengths, cp_size, documents=sorted(longest_first[:num_per_doc]))
    pairs, tokens = rank_pairs(slices), rank_tokens(slices)
    pieces: Slices = [[] for _ in range(cp_size)]
    whole_pairs = [0] * cp_size
    for document, rank in assign_whole(lengths, longest_first[num_per_doc:], pairs, tokens):
        length = lengths[document]
        pieces[rank].append(Slice(document, 0, length))
        tokens[rank] += length
        whole_pairs[rank] += length * (length + 1) // 2
    shares = token_shares(tokens, max_token_imbalance)
    for rank in range(cp_size):
        # Ranks above their share only give, and heads of together g tokens have at most g (g + 1) / 2 pairs.
        given = max(tokens[rank] - shares[rank], 0)
        most_left = pairs[rank] + whole_pairs[rank] - given * (given + 1) // 2
        if most_left > most_pairs and len(lengths) - num_per_doc >= cp_size:
            return None
    equalize_tokens(pieces, tokens, shares)
    for rank_pieces, rank_slices in zip(pieces, slices):
        rank_slices += rank_pieces
    give_empty_ranks_a_token(slices)
    if max(rank_pairs(slices)) > most_pairs:
        return None
    return slices
