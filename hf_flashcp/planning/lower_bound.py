"""A lower bound of the KV that any plan within the caps must move. It is computed without making a plan.

**Derivation** (from FlashCP eq. 2 and 3, for an exact exchange). Let several ranks hold a document of d tokens. Sort
them by the end of their last slice of the document, in descending order: d = e_0 > e_1 > e_2 > ... A rank needs every
token before its own last token. So the KV that the document moves is the sum of (end - own tokens) over the ranks that
hold it, e_0 + e_1 + ... - d, or

    e_1 + e_2 + ...                                                                                              (1)

where e_j = 0 if no more than j ranks hold the document. Now take the first j of these ranks. No other rank holds a
token from e_j on, so these j ranks hold the whole tail [e_j, d). They hold

- at most T_j tokens, and at most j A attention pairs, where A is `max_imbalance` times the mean over ranks,
- at least F_j tokens, because the caps of the other ranks leave at least that many. So besides the tail they hold
  F_j - (d - e_j) other tokens, each with the pairs of its position. The cheapest such tokens are those at the lowest
  positions of all documents, except tokens of the tail.

So e_j is at least the smallest e for which

    d - e <= T_j   and   pairs of [e, d) + least pairs of F_j - (d - e) other tokens <= j A,                     (2)

and the sum of these over all documents and all j from 1 to N - 1 is a lower bound of the total.

**Speed.** The left sides of (2) fall as e grows, so e is found by bisection. The bound of a longer document is never
smaller, so the sum over documents, longest first, ends at the first document that may fit on one rank. If the
other tokens are taken up to a position that reaches e, the ranks hold the whole document. Then (2) is the same for all
smaller e, and it is enough to check e = 0, with the document's own tokens left out of the other tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from ..plan.lengths import check_lengths
from ..plan.slices import attention_pairs
from .caps import Caps
from .joint_bound import joint_least_kv


class LowPositions:
    """The tokens of all documents, ordered by position. A token at a higher position has more attention pairs."""

    def __init__(self, caps: Caps):
        self.lengths = [item.tokens for item in caps.ascending]
        self.tokens, self.pairs = caps.tokens_up_to, caps.pairs_up_to
        # For each length, the number of tokens of all documents at positions below it.
        count = len(self.lengths)
        self.below = [self.tokens[index] + (count - index) * length for index, length in enumerate(self.lengths)]

    def cheapest(self, tokens: int) -> tuple[int, int]:
        """Return `(level, pairs)` of the cheapest `tokens` tokens: those at positions below `level` and some at it."""
        shorter = bisect_right(self.below, tokens)
        documents = len(self.lengths) - shorter
        if not documents:
            return self.lengths[-1], self.pairs[-1]
        level, more = divmod(tokens - self.tokens[shorter], documents)
        return level, self.pairs[shorter] + documents * attention_pairs(0, level) + more * (level + 1)

    def cheapest_without(self, document: int, tokens: int) -> int:
        """Return the pairs of the cheapest `tokens` tokens of all documents except one of length `document`."""
        own = bisect_right(self.lengths, document) - 1
        places = range(len(self.lengths))
        low = bisect_right(places, tokens, key=lambda at: self.below[at] - min(self.lengths[at], document))
        documents = len(self.lengths) - low - (own >= low)
        tokens_below = self.tokens[low] - (document if own < low else 0)
        pairs_below = self.pairs[low] - (attention_pairs(0, document) if own < low else 0)
        if not documents:
            return pairs_below
        level, more = divmod(tokens - tokens_below, documents)
        return pairs_below + documents * attention_pairs(0, level) + more * (level + 1)


def kv_lower_bound(
    lengths: Iterable[int], cp_size: int, max_imbalance: float = 1.05, max_token_imbalance: float = 1.0
) -> int:
    """Return the least KV that any plan within the caps moves in the forward of one full-attention layer.

    The bound is in tokens summed over ranks, like `report()["kv_total"]` of a plan, which is at least as large. It
    does not apply to plans that exceed the caps. It is the larger of the bounds that this module and `joint_bound.py`
    derive; the FlashCP paper has no such bounds.
    """
    caps = Caps(*check_lengths(lengths, cp_size), max_imbalance, max_token_imbalance)
    ends = least_ends(caps)
    return max(_sum_of_ends(caps, ends), joint_least_kv(caps, ends))


def least_kv(caps: Caps) -> int:
    """Return a lower bound like [`kv_lower_bound`] that takes each document alone, which is faster."""
    return _sum_of_ends(caps, least_ends(caps))


def _sum_of_ends(caps: Caps, ends: dict[int, list[int]]) -> int:
    return sum(sum(ends.get(length, ())) for length in caps.lengths)


def least_ends(caps: Caps) -> dict[int, list[int]]:
    """Return the least ends e_1, e_2, ... by (2) of a document of each length for which e_1 is above 0."""
    low = LowPositions(caps)
    found: dict[int, list[int]] = {}
    for length in reversed(low.lengths):
        if length not in found:
            ends = _ends_of(length, caps, low)
            if not ends:
                break
            found[length] = ends
    return found


def _ends_of(length: int, caps: Caps, low: LowPositions) -> list[int]:
    """Return the least ends e_1, e_2, ... of a document by (2), up to the last one above 0."""
    ends = []
    whole = attention_pairs(0, length)
    for ranks in range(1, caps.cp_size):
        most_pairs, most_tokens = ranks * caps.most_pairs, caps.most_together(ranks)
        needed = caps.least_together(ranks)
        if length <= most_tokens:
            if whole + low.cheapest_without(length, max(needed - length, 0)) <= most_pairs:
                break
        # Each of the ranks holds at least one token of the document, and together they hold at most their caps.
        least, most = max(length - most_tokens, 1), length - ranks
        while least < most:
            end = (least + most) // 2
            level, pairs = low.cheapest(max(needed - (length - end), 0))
            if level <= end and attention_pairs(end, length) + pairs <= most_pairs:
                most = end
            else:
                least = end + 1
        if most <= 0:
            break
        ends.append(most)
    return ends
