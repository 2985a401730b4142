"""`Caps`: what ranks may hold of one batch; `Item`: a slice that is still to be placed on a rank."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, repeat
from typing import NamedTuple

from ..plan.slices import Lengths, Slice, attention_pairs


class Item(NamedTuple):
    """A slice with its attention pairs and tokens, which are looked up too often to be counted. Items sort by
    pairs."""

    pairs: int
    piece: Slice
    tokens: int


def item_of(document: int, start: int, stop: int) -> Item:
    """The item of tokens [start, stop) of a document."""
    tokens = stop - start
    return Item(tokens * (stop + start + 1) // 2, Slice(document, start, stop), tokens)


class Caps:
    """The documents of a batch and how much of them a rank may hold: attention pairs and tokens, given as multiples of
    the mean over ranks. Where that leaves no `token_room`, tokens are equal within one: `ranks_with_most` ranks hold
    up to `most_tokens`, all others one less."""

    def __init__(self, lengths: Lengths, cp_size: int, max_imbalance: float = 1.05, max_token_imbalance: float = 1.0):
        self.lengths, self.cp_size = lengths, cp_size
        self.max_imbalance, self.max_token_imbalance = max_imbalance, max_token_imbalance
        self.total_tokens = sum(lengths)
        self.total_pairs = sum(attention_pairs(0, length) for length in lengths)
        self.most_pairs = math.floor(min(max_imbalance * self.total_pairs / cp_size, self.total_pairs))
        # The report's max / mean must not be above the cap by a rounding error either.
        while self.most_pairs * cp_size / self.total_pairs > max_imbalance:
            self.most_pairs -= 1
        cap = math.floor(min(max_token_imbalance * self.total_tokens / cp_size, self.total_tokens))
        equal, left_over = divmod(self.total_tokens, cp_size)
        self.token_room = cap > equal
        self.most_tokens = cap if self.token_room else equal + (left_over > 0)
        self.ranks_with_most = cp_size if self.token_room else left_over or cp_size

    def with_imbalance(self, max_imbalance: float, max_token_imbalance: float) -> Caps:
        """Caps of the same batch under other multiples of the mean."""
        return Caps(self.lengths, self.cp_size, max_imbalance, max_token_imbalance)

    def with_most(self, *, pairs: int | None = None, tokens: int | None = None) -> Caps:
        """The same caps but for what a rank may hold of attention pairs or tokens."""
        changed = copy.copy(self)
        changed.most_pairs = self.most_pairs if pairs is None else pairs
        changed.most_tokens = self.most_tokens if tokens is None else tokens
        return changed

    def allow(self, slices: Sequence[Sequence[Slice]]) -> bool:
        for held in slices:
            tokens = pairs = 0
            for _, start, stop in held:
                tokens += stop - start
                pairs += (stop - start) * (stop + start + 1) // 2
            if tokens > self.most_tokens or pairs > self.most_pairs:
                return False
        return True

    @property
    def shares(self) -> list[int]:
        """The most tokens of each rank, largest first."""
        with_less = self.cp_size - self.ranks_with_most
        return [self.most_tokens] * self.ranks_with_most + [self.most_tokens - 1] * with_less

    @cached_property
    def ascending(self) -> list[Item]:
        """Every document as one item, the shortest first."""
        documents = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        tokens = [self.lengths[document] for document in documents]
        pairs = [length * (length + 1) // 2 for length in tokens]
        pieces = map(Slice._make, zip(documents, repeat(0), tokens))
        return list(map(Item._make, zip(pairs, pieces, tokens)))

    @cached_property
    def tokens_up_to(self) -> list[int]:
        """Tokens of the shortest 0, 1, 2, ... documents."""
        return list(accumulate((item.tokens for item in self.ascending), initial=0))

    @cached_property
    def pairs_up_to(self) -> list[int]:
        return list(accumulate((item.pairs for item in self.ascending), initial=0))

    def most_together(self, ranks: int) -> int:
        """The most tokens that so many ranks may hold together: each of the others has one at least."""
        held = ranks * self.most_tokens - max(ranks - self.ranks_with_most, 0)
        return min(held, self.total_tokens - (self.cp_size - ranks))

    def least_together(self, ranks: int) -> int:
        """The fewest tokens that so many ranks may hold together: what the others cannot, and one each."""
        return max(self.total_tokens - self.most_together(self.cp_size - ranks), ranks)


def assign_shares(shares: list[int], tokens: list[int]) -> list[int]:
    """Shares of ranks in the order of ranks: the largest share goes to the rank with the most `tokens`."""
    fullest = sorted(range(len(tokens)), key=lambda rank: -tokens[rank])
    by_rank = [0] * len(tokens)
    for share, rank in zip(shares, fullest):
        by_rank[rank] = share
    return by_rank
