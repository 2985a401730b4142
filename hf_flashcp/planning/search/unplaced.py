"""`Unplaced`: the documents and pieces that are still to be placed while a plan of "search" is built."""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import NamedTuple

from ..caps import Caps, Item, item_of


class Range(NamedTuple):
    """Documents [start, stop) of the ascending list of whole documents, with their tokens and pairs."""

    start: int
    stop: int
    tokens: int
    pairs: int


class Unplaced:
    """The documents and pieces that no rank holds yet.

    These are the documents [first, last) of `whole`, which is in ascending order, and the `loose` remainders of
    documents that were cut.
    """

    def __init__(self, caps: Caps):
        self.caps = caps
        self.whole, self.tokens_up_to, self.pairs_up_to = caps.ascending, caps.tokens_up_to, caps.pairs_up_to
        self.first, self.last = 0, len(self.whole)
        self.loose: list[Item] = []

    def ascending(self) -> list[Item]:
        """Return all items, those with the fewest pairs first."""
        items = self.whole[self.first : self.last]
        for item in self.loose:
            insort(items, item)
        return items

    def largest(self) -> Item | None:
        """Return the item with the most pairs, or `None` if there are no items. The item stays unplaced."""
        longest = self.whole[self.last - 1 : self.last] if self.last > self.first else []
        return max(self.loose + longest, default=None)

    def take(self, item: Item) -> None:
        """Remove an item that a rank has taken."""
        if item in self.loose:
            self.loose.remove(item)
        elif item == self.whole[self.last - 1]:
            self.last -= 1
        elif item == self.whole[self.first]:
            self.first += 1
        else:
            index = self.whole.index(item, self.first, self.last)
            self.take_range(self.range(index, index + 1))

    def range(self, start: int, stop: int) -> Range:
        """Return the range of documents [start, stop) of `whole`."""
        tokens = self.tokens_up_to[stop] - self.tokens_up_to[start]
        return Range(start, stop, tokens, self.pairs_up_to[stop] - self.pairs_up_to[start])

    def take_range(self, taken: Range) -> None:
        """Remove a range of documents that a rank has taken."""
        start, stop, tokens, pairs = taken
        if start == self.first:
            self.first = stop
        else:
            self.whole = self.whole[:start] + self.whole[stop:]
            self.tokens_up_to = self.tokens_up_to[:start] + [held - tokens for held in self.tokens_up_to[stop:]]
            self.pairs_up_to = self.pairs_up_to[:start] + [held - pairs for held in self.pairs_up_to[stop:]]
            self.last -= stop - start

    def add(self, document: int, start: int, stop: int) -> None:
        """Add tokens [start, stop) of a document that was cut, if there are any."""
        if start < stop:
            self.loose.append(item_of(document, start, stop))

    def least_pairs(self, tokens: int) -> int:
        """Return the pairs of the shortest documents that have at most `tokens` tokens together."""
        up_to = bisect_right(self.tokens_up_to, self.tokens_up_to[self.first] + tokens, self.first, self.last + 1) - 1
        return self.pairs_up_to[max(up_to, self.first)] - self.pairs_up_to[self.first]

    def leftover(self, document: int, most_tokens: int, most_pairs: int) -> Item | None:
        """Return the longest loose piece of another document that fits and has at most the average pairs per token."""
        best, most = None, 0
        for item in self.loose:
            if most < item.tokens <= most_tokens and item.pairs <= most_pairs and item.piece.document != document:
                if item.pairs * self.caps.most_tokens <= item.tokens * self.caps.most_pairs:
                    best, most = item, item.tokens
        return best

    def heads(self) -> list[Item]:
        """Return items whose heads may fill a rank: the shortest and longest document and the loose piece that starts
        earliest."""
        found = []
        if self.first < self.last:
            found.append(self.whole[self.first])
            if self.last - 1 > self.first:
                found.append(self.whole[self.last - 1])
        if self.loose:
            found.append(min(self.loose, key=lambda item: (item.piece.start, -item.piece.stop)))
        return found
