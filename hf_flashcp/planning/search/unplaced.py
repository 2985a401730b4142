"""What the strategy "search" may spend, and what of the documents is still to be placed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ...plan.slices import attention_pairs


Item = tuple[int, int, int, int]
"""`(pairs, document, start, stop)`: a piece of a document that is still to be placed."""


class Budget:
    """What a rank may hold, and the documents in ascending order with their running sums.

    Attributes:
        most_pairs (`int`): attention pairs that a rank may hold.
        most_tokens (`int`): tokens that a rank may hold.
        ranks_with_most (`int`): how many ranks may hold `most_tokens`; all others one less.
        token_room (`bool`): whether ranks may hold fewer than that as they like.
    """

    def __init__(self, lengths: Sequence[int], cp_size: int, max_imbalance: float, max_token_imbalance: float):
        self.lengths, self.cp_size = lengths, cp_size
        self.ascending = sorted(range(len(lengths)), key=lengths.__getitem__)
        ordered = [lengths[document] for document in self.ascending]
        self.tokens_up_to = list(accumulate(ordered, initial=0))
        self.pairs_up_to = list(accumulate([length * (length + 1) // 2 for length in ordered], initial=0))
        self.total_tokens, self.total_pairs = self.tokens_up_to[-1], self.pairs_up_to[-1]
        self.most_pairs = math.floor(min(max_imbalance * self.total_pairs / cp_size, self.total_pairs))
        while self.most_pairs * cp_size / self.total_pairs > max_imbalance:
            self.most_pairs -= 1
        cap = math.floor(min(max_token_imbalance * self.total_tokens / cp_size, self.total_tokens))
        equal, left_over = divmod(self.total_tokens, cp_size)
        self.token_room = cap > equal
        self.most_tokens = cap if self.token_room else equal + (left_over > 0)
        self.ranks_with_most = cp_size if self.token_room else left_over or cp_size


class Supply:
    """The documents and pieces left: untouched documents `first` to `last` of an ascending list, and loose pieces."""

    def __init__(self, budget: Budget):
        self.budget = budget
        self.documents = budget.ascending
        self.tokens_up_to, self.pairs_up_to = budget.tokens_up_to, budget.pairs_up_to
        self.first, self.last = 0, len(self.documents)
        self.loose: list[Item] = []

    def whole(self, index: int) -> Item:
        document = self.documents[index]
        length = self.budget.lengths[document]
        return (length * (length + 1) // 2, document, 0, length)

    def items(self) -> list[Item]:
        return self.loose + [self.whole(index) for index in range(self.first, self.last)]

    def largest(self) -> Item | None:
        """The item with the most pairs, without taking it."""
        largest = max(self.loose, default=None)
        if self.last > self.first:
            whole = self.whole(self.last - 1)
            if largest is None or whole > largest:
                return whole
        return largest

    def take(self, item: Item) -> None:
        if item in self.loose:
            self.loose.remove(item)
        elif item == self.whole(self.last - 1):
            self.last -= 1
        elif item == self.whole(self.first):
            self.first += 1
        else:
            index = self.documents.index(item[1], self.first, self.last)
            self.take_range(index, index + 1)

    def held(self, start: int, stop: int) -> tuple[int, int]:
        """Tokens and pairs of the untouched documents `start` to `stop` of the ascending list."""
        return (
            self.tokens_up_to[stop] - self.tokens_up_to[start],
            self.pairs_up_to[stop] - self.pairs_up_to[start],
        )

    def take_range(self, start: int, stop: int) -> None:
        """Takes the untouched documents `start` to `stop` of the ascending list."""
        if start == self.first:
            self.first = stop
            return
        tokens, pairs = self.held(start, stop)
        self.documents = self.documents[:start] + self.documents[stop:]
        self.tokens_up_to = self.tokens_up_to[:start] + [held - tokens for held in self.tokens_up_to[stop:]]
        self.pairs_up_to = self.pairs_up_to[:start] + [held - pairs for held in self.pairs_up_to[stop:]]
        self.last -= stop - start

    def add(self, document: int, start: int, stop: int) -> None:
        if start < stop:
            self.loose.append((attention_pairs(start, stop), document, start, stop))

    def least_pairs(self, tokens: int) -> int:
        """Pairs of the shortest documents that hold up to that many tokens."""
        up_to = bisect_right(self.tokens_up_to, self.tokens_up_to[self.first] + tokens, self.first, self.last + 1) - 1
        return self.pairs_up_to[max(up_to, self.first)] - self.pairs_up_to[self.first]

    def leftover(self, document: int, most_tokens: int, most_pairs: int) -> Item | None:
        """The longest loose piece of another document, of up to `most_tokens` and with fewer pairs a token than the
        average."""
        budget = self.budget
        best = None
        for item in self.loose:
            pairs, other, start, stop = item
            if other != document and stop - start <= most_tokens and pairs <= most_pairs:
                if pairs * budget.most_tokens <= (stop - start) * budget.most_pairs:
                    if best is None or stop - start > best[3] - best[2]:
                        best = item
        return best

    def heads(self) -> list[Item]:
        """Items whose heads may fill up a rank: the shortest and the longest document, and what starts earliest."""
        found = []
        if self.first < self.last:
            found.append(self.whole(self.first))
            if self.last - 1 > self.first:
                found.append(self.whole(self.last - 1))
        if self.loose:
            found.append(min(self.loose, key=lambda item: (item[2], -item[3])))
        return found
