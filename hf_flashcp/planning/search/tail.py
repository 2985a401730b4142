"""`TailRank`: fills a rank with the tail of a long document and with whatever fits beside it."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from ...plan.slices import Slice, attention_pairs
from ..caps import Item
from .pack import longest_tail
from .unplaced import Range


if TYPE_CHECKING:
    from .build import Construction


class Tail(NamedTuple):
    """The last `tokens` tokens, beginning at `start`, of what was left of a document when a rank took them."""

    start: int
    tokens: int


Tails = dict[int, list[Tail]]
"""The tails that were cut off each document, in descending order of their tokens' positions."""


class OpenRank:
    """The next rank, which is being filled.

    Attributes:
        held (`list[Slice]`): the slices that it holds.
        tokens (`int`): the most tokens that it may still take.
        needed (`int`): the fewest tokens that it still has to take.
        pairs (`int`): the most attention pairs that it may still take.
    """

    def __init__(self, plan: Construction):
        self.held: list[Slice] = []
        self.tokens, self.needed, self.pairs = plan.most, plan.needed, plan.caps.most_pairs

    def hold(self, item: Item) -> None:
        """Add an item to the rank."""
        self.held.append(item.piece)
        self.tokens -= item.tokens
        self.needed -= item.tokens
        self.pairs -= item.pairs

    def hold_slice(self, document: int, start: int, stop: int) -> None:
        """Add tokens [start, stop) of a document to the rank."""
        self.held.append(Slice(document, start, stop))
        self.tokens -= stop - start
        self.needed -= stop - start
        self.pairs -= attention_pairs(start, stop)

    def hold_range(self, documents: Range, items: list[Item]) -> None:
        """Add a range of documents, given also as items, to the rank."""
        self.held += [item.piece for item in items]
        self.tokens -= documents.tokens
        self.needed -= documents.tokens
        self.pairs -= documents.pairs


class TailRank(OpenRank):
    """A rank that takes the tail of tokens [start, stop) of a document, and other slices beside it.

    `tail` is the length of the longest tail that the rank can take beside the slices that it already holds.
    """

    def __init__(self, plan: Construction, item: Item):
        super().__init__(plan)
        self.plan, self.unplaced, self.target = plan, plan.unplaced, plan.target
        self.document, self.start, self.stop = item.piece
        self.tails = plan.tails.setdefault(self.document, [])
        self.tail, self.own_head, self.most_tail = 0, 0, self.tokens

    def take_own_head(self) -> None:
        """Take as much of the document's head as is needed to keep every rank at the target.

        The target then also limits the tail.
        """
        if self.target < math.inf:
            self.own_head = self._balancing_head()
            if self.own_head:
                self._take_head_of_own(self.own_head)
            self.most_tail = max(int(self.target / len(self.tails)), 1) if self.tails else self.tokens
        self.tail = min(longest_tail(self.start, self.stop, self.pairs), self.tokens, self.most_tail)

    def take_short_documents(self) -> None:
        """Take short documents for the tokens that the tail cannot provide within the cap on pairs.

        If they leave pairs unused, more of the document's own head replaces some of them.
        """
        if self.tail >= self.needed:
            return
        unplaced, short = self.unplaced, self._short_documents()
        longest = longest_tail(self.start, self.stop, self.pairs - short.pairs)
        self.tail = min(longest, self.tokens - short.tokens, self.most_tail)
        tail_start = self.stop - self.tail
        unused = self.pairs - short.pairs - attention_pairs(tail_start, self.stop)
        if self.target == math.inf and unused > self.plan.caps.most_pairs // 64:
            replaced = self._replaceable(short, tail_start, unused)
            if replaced.tokens:
                self._take_head_of_own(replaced.tokens)
                short = unplaced.range(replaced.stop, short.stop)
        if short.tokens:
            self.hold_range(short, unplaced.whole[short.start : short.stop])
            unplaced.take_range(short)

    def take_leftovers(self) -> None:
        """Take remainders of documents that gave a head away, which cost no further KV."""
        while self.tail < self.needed:
            leftover = self.unplaced.leftover(self.document, self.needed - self.tail, self.pairs)
            if leftover is None:
                return
            self.unplaced.take(leftover)
            self.hold(leftover)
            self.tail = min(longest_tail(self.start, self.stop, self.pairs), self.tokens, self.most_tail)

    def take_head(self) -> bool:
        """Take a head to fill the rank together with the tail, if needed; return whether the rank is full."""
        if self.tail >= self.needed:
            return True
        choice = self._tail_and_head(self.unplaced.heads()) or self._tail_and_head(self.unplaced.loose)
        if choice is None:
            return False
        self.tail, other = choice
        head = self.needed - self.tail
        if other is None:
            self._take_head_of_own(head)
        elif head:
            document, start, stop = other.piece
            self.unplaced.take(other)
            self.hold_slice(document, start, start + head)
            self.unplaced.add(document, start + head, stop)
        return True

    def take_tail(self) -> None:
        """Take the tail, and return the rest of the document to the unplaced items."""
        tail = Tail(self.stop - self.tail, self.tail)
        if tail.tokens:
            self.hold_slice(self.document, tail.start, self.stop)
        self.tails.append(tail)
        self.unplaced.add(self.document, self.start, tail.start)

    def _take_head_of_own(self, tokens: int) -> None:
        self.hold_slice(self.document, self.start, self.start + tokens)
        self.start += tokens

    def _balancing_head(self) -> int:
        """Return how many tokens of the document's head to hold so that no rank exceeds the target."""
        start, stop, tails = self.start, self.stop, len(self.tails)
        before = self.plan.before.get(self.document, ())
        receivers = max(len(before), tails + 1)
        tail = min(longest_tail(start, stop, self.plan.caps.most_pairs), self.tokens)
        receiving = stop - tail - self.target
        sending = (self.target - tails * tail) / receivers
        last_end = before[-1].start if before else 0
        to_spread = max(last_end - self.target / receivers, 0) * self.plan.spreading
        to_spread += self.plan.low_positions(self.document, tails) - start
        own = int(max(receiving, min(sending, to_spread), 0))
        return max(min(own, self.tokens - tail, stop - start - tail), 0)

    def _short_documents(self) -> Range:
        """Return the short documents to take: as many as fit in the tokens that the tail cannot provide."""
        unplaced, end = self.unplaced, self._end_of_short_documents()
        first, tokens_up_to, pairs_up_to = unplaced.first, unplaced.tokens_up_to, unplaced.pairs_up_to
        start, stop, needed, most_tail = self.start, self.stop, self.needed, self.most_tail
        settings = self.plan.settings
        if settings.reserve:
            reserved = tokens_up_to[first] + settings.reserve * self.plan.caps.most_tokens
            first = min(bisect_right(tokens_up_to, reserved, first, end + 1), end)
        up_to, too_many = first, end + 1
        while too_many - up_to > 1:
            middle = (up_to + too_many) // 2
            left = self.pairs - pairs_up_to[middle] + pairs_up_to[first]
            filled = tokens_up_to[middle] - tokens_up_to[first]
            tail = min(longest_tail(start, stop, left), most_tail) if left >= 0 else needed
            if filled <= settings.filling * (needed - tail):
                up_to = middle
            else:
                too_many = middle
        return unplaced.range(first, up_to)

    def _end_of_short_documents(self) -> int:
        """Return the end of the documents that the rank may take as short documents.

        Later ranks need the others, so that they do not hold too many tokens at low positions of this document.
        """
        unplaced, end = self.unplaced, self.unplaced.last
        if self.target < math.inf:
            up_to = unplaced.tokens_up_to
            most = up_to[end] - self.plan.low_positions(self.document, len(self.tails))
            end = max(bisect_right(up_to, most, unplaced.first, end + 1) - 1, unplaced.first)
        return end

    def _replaceable(self, short: Range, stop: int, pairs: int) -> Range:
        """Return the shortest of the short documents that an own head up to `stop` can replace for `pairs` more pairs.

        The tail grows by whole tokens. Pairs that it leaves unused would be missing on later ranks.
        """
        tokens_up_to, pairs_up_to = self.unplaced.tokens_up_to, self.unplaced.pairs_up_to
        up_to, too_many = short.start, short.stop + 1
        while too_many - up_to > 1:
            middle = (up_to + too_many) // 2
            end = self.start + tokens_up_to[middle] - tokens_up_to[short.start]
            saved = pairs_up_to[middle] - pairs_up_to[short.start]
            if end < stop and attention_pairs(self.start, end) - saved <= pairs:
                up_to = middle
            else:
                too_many = middle
        return self.unplaced.range(short.start, up_to)

    def _tail_and_head(self, others: list[Item]) -> tuple[int, Item | None] | None:
        """Return `(tail, other)`: the length of the tail, and the item whose head provides the rank's other tokens.

        The item is one of `others`, or `None` for the document itself. Of all choices, this is the one that exceeds
        the target least and then costs the least KV.
        """
        start, stop, length, needed = self.start, self.stop, self.stop - self.start, self.needed
        tails, pairs, most_tail, target = len(self.tails), self.pairs, self.most_tail, self.target
        receivers = self.plan.receivers(self.document)
        # Each choice: tokens sent beyond the target, cost, whether another item is cut, tail, item.
        choices: list[tuple[float, int, bool, int, Item | None]] = []
        tail = tail_beside_head(stop, start, needed, pairs) if needed < length else None
        if tail is not None:
            tail = min(tail, most_tail)
            sent = tail * tails + (self.own_head + needed - tail) * receivers
            choices.append((max(sent - target, 0), stop - tail, False, tail, None))
        for other in others:
            document, other_start, _ = other.piece
            head = needed - length
            if head > 0 and attention_pairs(start, stop) + attention_pairs(other_start, other_start + head) <= pairs:
                tail = length
            else:
                tail = tail_beside_head(stop, other_start, needed, pairs)
                if tail is None or tail > length:
                    continue
                tail = min(tail, most_tail)
                head = needed - tail
            if head < other.tokens:
                cost = other_start + head + (stop - tail if tail < length else 0)
                sent = tail * tails + self.own_head * receivers + head * self.plan.receivers(document)
                choices.append((max(sent - target, 0), cost, True, tail, other))
        if not choices:
            return None
        *_, tail, giver = min(choices)
        return tail, giver


def tail_beside_head(stop: int, head_start: int, tokens: int, pairs: int) -> int | None:
    """Return the length of the longest tail that fits in `pairs` attention pairs together with a head.

    The tail ends at token `stop` of its document. The head starts at token `head_start` of the same document or of
    another. Together they have exactly `tokens` tokens. Making the tail a token longer and the head a token shorter
    adds a constant number of pairs, `stop - head_start - tokens`, so the length solves a linear equation. The result
    is `None` if not even the head alone fits.
    """
    slope = stop - head_start - tokens
    spare = pairs - attention_pairs(head_start, head_start + tokens)
    if spare < 0:
        return None
    return min(spare // slope, tokens) if slope > 0 else tokens
