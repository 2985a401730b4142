"""A plan of the strategy "search" in the making, and the rank that is filled next."""

from __future__ import annotations

import math
from typing import NamedTuple

from ...plan.slices import Slice, Slices, attention_pairs
from ..caps import Caps, Item
from .settings import Settings
from .unplaced import Range, Unplaced


class Tail(NamedTuple):
    """The last `tokens` tokens, from `start` on, of what was left of a document when a rank took them."""

    start: int
    tokens: int


Tails = dict[int, list[Tail]]
"""The tails that were cut off each document, the last tokens first."""


class Unfinished:
    """What the ranks of a plan hold so far, and what is still to be placed.

    No rank should receive or send more than `target`, which own heads meet in place of short documents. `before` are
    the tails of an earlier construction, from which the number of each document's holders is foreseen; `spreading` is
    how much of the low positions to spread as heads, against what they suggest. The next rank takes `needed` to `most`
    tokens.
    """

    def __init__(
        self,
        caps: Caps,
        settings: Settings,
        target: float = math.inf,
        before: Tails | None = None,
        spreading: float = 1.0,
    ):
        self.caps, self.unplaced, self.settings = caps, Unplaced(caps), settings
        self.target, self.before, self.spreading = target, before or {}, spreading
        self.shares = caps.shares
        self.slices: Slices = []
        self.tokens_left, self.pairs_left = caps.total_tokens, caps.total_pairs
        self.tails: Tails = {}
        self._look_at_next_rank()

    def _look_at_next_rank(self) -> None:
        """The most and the fewest tokens of the next rank, which has to take what all ranks after it cannot."""
        self.ranks_left = self.caps.cp_size - len(self.slices)
        self.most = self.needed = self.shares[len(self.slices)]
        if self.caps.token_room:
            self.needed = max(self.tokens_left - (self.ranks_left - 1) * self.most, 0)

    def close(self, rank: OpenRank) -> None:
        """Ends a rank that is as full as it has to be."""
        self.tokens_left -= self.most - rank.tokens
        self.pairs_left -= self.caps.most_pairs - rank.pairs
        self.slices.append(rank.held)
        self._look_at_next_rank()

    def receivers(self, document: int) -> int:
        """How many ranks will need the head of a document, as far as one can tell."""
        return max(len(self.tails.get(document, ())), len(self.before.get(document, ())), 1)

    def low_positions(self, document: int, tails: int) -> float:
        """Tokens that, last time, ranks after the next one held of a document's low positions, which all others need,
        beyond what the target lets them send."""
        beyond = 0.0
        for index, tail in enumerate(self.before.get(document, ())[tails + 1 :], tails + 1):
            beyond += max(tail.tokens - self.target / index, 0)
        return self.spreading * beyond


class OpenRank:
    """The next rank: what it holds, and what it may take besides: up to `tokens`, at least `needed`, up to `pairs`."""

    def __init__(self, plan: Unfinished):
        self.held: list[Slice] = []
        self.tokens, self.needed, self.pairs = plan.most, plan.needed, plan.caps.most_pairs

    def hold(self, item: Item) -> None:
        self.held.append(item.piece)
        self.tokens -= item.tokens
        self.needed -= item.tokens
        self.pairs -= item.pairs

    def hold_slice(self, document: int, start: int, stop: int) -> None:
        self.held.append(Slice(document, start, stop))
        self.tokens -= stop - start
        self.needed -= stop - start
        self.pairs -= attention_pairs(start, stop)

    def hold_range(self, documents: Range, items: list[Item]) -> None:
        self.held += [item.piece for item in items]
        self.tokens -= documents.tokens
        self.needed -= documents.tokens
        self.pairs -= documents.pairs
