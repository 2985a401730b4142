"""The least KV that any plan within the caps must move, without planning: what strategies are measured against.

**Derivation** (from FlashCP eq. 2 and 3 and exact exchange). Let a document of d tokens be held by several ranks, and
sort these by the end of their last slice of it, descending: d = e_0 > e_1 > e_2 > ... A rank needs every token before
its own last one, so the document moves the sum over holders of (end - own tokens) = e_0 + e_1 + ... - d, which is

    e_1 + e_2 + ...                                                                                              (1)

(0 from the number of holders on). Now take the first j of the holders. Nobody else holds a token from e_j on, so these
j ranks hold the whole tail [e_j, d). But j ranks hold

- at most T_j tokens, and at most j A attention pairs, A being `max_imbalance` times the mean over ranks,
- at least F_j tokens: the others cannot hold the rest of the batch. Beside the tail they hold other tokens, each with
  the pairs of its position, and the cheapest choice of these are the tokens at the lowest positions of all documents
  (those of the tail left out).

So e_j is no less than the smallest e for which

    d - e <= T_j   and   pairs of [e, d) + least pairs of F_j - (d - e) other tokens <= j A,                     (2)

and the sum of these over all documents and j = 1 ... N-1 is a lower bound of the total.

**Why it is fast.** The left side of (2) falls with e, so that e is found by bisection. A longer document in place of a
shorter one never helps, so that the first document, longest first, that fits on one rank ends the sum. And where the
level up to which the other tokens are taken reaches e, the document is held whole: then (2) is the same for all
smaller e, and only e = 0 has to be looked at with the document's own tokens left out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from ..plan.lengths import check_lengths
from ..plan.slices import attention_pairs
from .caps import Caps


class LowPositions:
    """The tokens of all documents in the order of their positions, which is the order of their attention pairs."""

    def __init__(self, caps: Caps):
        self.lengths = [item.tokens for item in caps.ascending]
        self.tokens, self.pairs = caps.tokens_up_to, caps.pairs_up_to
        # Tokens at positions below a length, of all documents.
        count = len(self.lengths)
        self.below = [self.tokens[index] + (count - index) * length for index, length in enumerate(self.lengths)]

    def cheapest(self, tokens: int) -> tuple[int, int]:
        """`(level, pairs)` of the so many cheapest tokens: all positions below `level`, and some at it."""
        shorter = bisect_right(self.below, tokens)
        documents = len(self.lengths) - shorter
        if not documents:
            return self.lengths[-1], self.pairs[-1]
        level, more = divmod(tokens - self.tokens[shorter], documents)
        return level, self.pairs[shorter] + documents * attention_pairs(0, level) + more * (level + 1)

    def cheapest_without(self, document: int, tokens: int) -> int:
        """Pairs of the so many cheapest tokens of all documents but one of length `document`."""
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
    """KV that every plan within the caps moves in the forward of one full-attention layer, in tokens summed over
    ranks: at most a plan's `report()["kv_total"]` (derived in the module's docstring; the FlashCP paper has none). It
    says nothing about plans outside the caps, nor where none is within them."""
    return least_kv(Caps(*check_lengths(lengths, cp_size), max_imbalance, max_token_imbalance))


def least_kv(caps: Caps) -> int:
    """[`kv_lower_bound`] of documents and caps that are checked already."""
    low = LowPositions(caps)
    total, previous, of_document = 0, 0, 0
    for length in reversed(low.lengths):
        if length != previous:
            previous, of_document = length, sum(_least_ends(length, caps, low))
        if not of_document:
            break
        total += of_document
    return total


def _least_ends(length: int, caps: Caps, low: LowPositions) -> list[int]:
    """The least ends e_1, e_2, ... by (2) of a document, up to the last above 0."""
    ends = []
    whole = attention_pairs(0, length)
    for ranks in range(1, caps.cp_size):
        most_pairs, most_tokens = ranks * caps.most_pairs, caps.most_together(ranks)
        needed = caps.least_together(ranks)
        if length <= most_tokens:
            if whole + low.cheapest_without(length, max(needed - length, 0)) <= most_pairs:
                break
        # At least one token of the document on each of the ranks, at most what they may hold.
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
