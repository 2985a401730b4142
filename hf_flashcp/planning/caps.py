"""`Caps`, the most that a rank may hold of a batch, and `Item`, a slice that is to be placed on a rank."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, repeat
from typing import NamedTuple

from ..plan.slices import Lengths, Slice, attention_pairs


class Item(NamedTuple):
    """A slice with its numbers of attention pairs and tokens, which are used too often to be recomputed.

    Items sort by pairs.
    """

    pairs: int
    piece: Slice
    tokens: int


def item_of(document: int, start: int, stop: int) -> Item:
    """Return the item of tokens [start, stop) of a document."""
    tokens = stop - start
    return Item(tokens * (stop + start + 1) // 2, Slice(document, start, stop), tokens)


_OF_DOCUMENTS = ("ascending", "longest_first", "tokens_up_to", "pairs_up_to")
"""The cached properties of [`Caps`] that depend on the documents alone."""


class Caps:
    """The documents of a batch, and how many attention pairs and tokens a rank may hold.

    The caps are given as multiples of the mean over ranks. If the cap on tokens allows no rank more than its equal
    share (`token_room` is false), ranks' tokens differ by at most one: `ranks_with_most` ranks hold up to
    `most_tokens`, and all others hold up to one token less.
    """

    def __init__(self, lengths: Lengths, cp_size: int, max_imbalance: float = 1.05, max_token_imbalance: float = 1.0):
        self.lengths, self.cp_size = lengths, cp_size
        self.max_imbalance, self.max_token_imbalance = max_imbalance, max_token_imbalance
        self.total_tokens = sum(lengths)
        self.total_pairs = sum(attention_pairs(0, length) for length in lengths)
        self.most_pairs = math.floor(min(max_imbalance * self.total_pairs / cp_size, self.total_pairs))
        # Rounding must not put the max / mean of the plan's report above the cap.
        while self.most_pairs * cp_size / self.total_pairs > max_imbalance:
            self.most_pairs -= 1
        cap = math.floor(min(max_token_imbalance * self.total_tokens / cp_size, self.total_tokens))
        equal, left_over = divmod(self.total_tokens, cp_size)
        self.token_room = cap > equal
        self.most_tokens = cap if self.token_room else equal + (left_over > 0)
        self.ranks_with_most = cp_size if self.token_room else left_over or cp_size

    def with_imbalance(self, max_imbalance: float, max_token_imbalance: float) -> Caps:
        """Return the caps of the same batch for other multiples of the mean."""
        caps = Caps(self.lengths, self.cp_size, max_imbalance, max_token_imbalance)
        vars(caps).update({name: vars(self)[name] for name in _OF_DOCUMENTS if name in vars(self)})
        return caps

    def with_most(self, *, pairs: int | None = None, tokens: int | None = None) -> Caps:
        """Return a copy of the caps with another maximum of attention pairs or tokens per rank."""
        changed = copy.copy(self)
        changed.most_pairs = self.most_pairs if pairs is None else pairs
        changed.most_tokens = self.most_tokens if tokens is None else tokens
        return changed

    def allow(self, slices: Sequence[Sequence[Slice]]) -> bool:
        """Return whether every rank's slices are within the caps."""
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
        """The most tokens that each rank may hold, largest first."""
        with_less = self.cp_size - self.ranks_with_most
        return [self.most_tokens] * self.ranks_with_most + [self.most_tokens - 1] * with_less

    def prepare(self) -> None:
        """Sort the documents, so that caps made by [`~Caps.with_imbalance`] do not sort them again."""
        for name in _OF_DOCUMENTS:
            getattr(self, name)

    @cached_property
    def ascending(self) -> list[Item]:
        """All documents as items, shortest first."""
        documents = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        tokens = [self.lengths[document] for document in documents]
        pairs = [length * (length + 1) // 2 for length in tokens]
        pieces = map(Slice._make, zip(documents, repeat(0), tokens))
        return list(map(Item._make, zip(pairs, pieces, tokens)))

    @cached_property
    def longest_first(self) -> list[int]:
        """The documents, longest first; of equally long ones the first one first."""
        return sorted(range(len(self.lengths)), key=lambda document: -self.lengths[document])

    @cached_property
    def tokens_up_to(self) -> list[int]:
        """Number of tokens in the shortest 0, 1, 2, ... documents."""
        return list(accumulate((item.tokens for item in self.ascending), initial=0))

    @cached_property
    def pairs_up_to(self) -> list[int]:
        """Number of attention pairs in the shortest 0, 1, 2, ... documents."""
        return list(accumulate((item.pairs for item in self.ascending), initial=0))

    def most_together(self, ranks: int) -> int:
        """Return the most tokens that some number of ranks may hold together, if every other rank has at least one."""
        held = ranks * self.most_tokens - max(ranks - self.ranks_with_most, 0)
        return min(held, self.total_tokens - (self.cp_size - ranks))

    def least_together(self, ranks: int) -> int:
        """Return the fewest tokens that some number of ranks may hold together.

        They hold the tokens that the other ranks cannot hold, and at least one token each.
        """
        return max(self.total_tokens - self.most_together(self.cp_size - ranks), ranks)


def assign_shares(shares: list[int], tokens: list[int]) -> list[int]:
    """Return each rank's share: the largest share goes to the rank with the most `tokens`, and so on."""
    fullest = sorted(range(len(tokens)), key=lambda rank: -tokens[rank])
    by_rank = [0] * len(tokens)
    for share, rank in zip(shares, fullest):
        by_rank[rank] = share
    return by_rank
