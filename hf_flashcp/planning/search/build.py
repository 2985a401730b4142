"""Builds one plan of the strategy "search": cuts tails off long documents, rank by rank, and packs the rest whole.

The construction rests on one identity (derived from FlashCP eq. 3 and an exact exchange). A document's traffic is the
sum of the ends of its ranks' last slices, over all ranks that hold some of it except the rank with its last token. So
cutting the tail [h, l) off a document costs exactly h, no matter which earlier tokens of the document the same rank
takes as well (its "own head"). The tokens between the own head and the tail are one more item to place.
"""

from __future__ import annotations

import math

from ...plan.slices import Slices, attention_pairs
from ..caps import Caps, Item
from .pack import pack
from .settings import Settings
from .tail import OpenRank, TailRank, Tails
from .unplaced import Unplaced


class Construction:
    """Builds one plan. Holds the slices of the ranks that are complete, and the items that are still to be placed.

    Args:
        caps (`Caps`): the documents, and what a rank may hold of them.
        settings (`Settings`): the choices that differ between constructions.
        target (`float`, *optional*): the most tokens whose KV a rank should receive or send. Ranks take own heads in
            place of short documents to stay below it.
        before (`Tails`, *optional*): tails of an earlier construction. They predict how many ranks will hold each
            document.
        spreading (`float`, *optional*, defaults to 1.0): how much of the documents' low positions to spread over ranks
            as own heads, relative to the amount that `before` suggests.
        most_packs (`float`, *optional*): the number of times that whole documents are packed before it gives up.

    Attributes:
        needed (`int`): the fewest tokens that the next rank has to take.
        most (`int`): the most tokens that the next rank may take.
    """

    def __init__(
        self,
        caps: Caps,
        settings: Settings,
        target: float = math.inf,
        before: Tails | None = None,
        spreading: float = 1.0,
        most_packs: float = math.inf,
    ):
        self.caps, self.unplaced, self.settings = caps, Unplaced(caps), settings
        self.target, self.before, self.spreading = target, before or {}, spreading
        self.packs_left = most_packs
        self.shares = caps.shares
        self.slices: Slices = []
        self.tokens_left, self.pairs_left = caps.total_tokens, caps.total_pairs
        self.tails: Tails = {}
        self._look_at_next_rank()

    def _look_at_next_rank(self) -> None:
        """Set the most and the fewest tokens of the next rank. It has to take the tokens that later ranks cannot."""
        self.ranks_left = self.caps.cp_size - len(self.slices)
        self.most = self.needed = self.shares[len(self.slices)]
        if self.caps.token_room:
            self.needed = max(self.tokens_left - (self.ranks_left - 1) * self.most, 0)

    def close(self, rank: OpenRank) -> None:
        """Add a complete rank to the plan."""
        self.tokens_left -= self.most - rank.tokens
        self.pairs_left -= self.caps.most_pairs - rank.pairs
        self.slices.append(rank.held)
        self._look_at_next_rank()

    def receivers(self, document: int) -> int:
        """Return an estimate of how many ranks will need the head of a document."""
        return max(len(self.tails.get(document, ())), len(self.before.get(document, ())), 1)

    def low_positions(self, document: int, tails: int) -> float:
        """Return how many tokens at low positions of a document should be spread over ranks as own heads.

        All other ranks that hold the document need these tokens. In the earlier construction, the ranks after the next
        one held this many more of them than the target allows them to send (times `spreading`).
        """
        beyond = 0.0
        for index, tail in enumerate(self.before.get(document, ())[tails + 1 :], tails + 1):
            beyond += max(tail.tokens - self.target / index, 0)
        return self.spreading * beyond

    def run(self) -> Slices | None:
        """Return the slices of every rank, or `None` if these settings lead to no plan."""
        packed, stuck, whole_first = None, False, self.settings.whole_first
        while packed is None and not stuck and self.packs_left > 0:
            # The last rank takes all remaining items, or there is no plan.
            largest = self.unplaced.largest() if self.ranks_left > 1 else None
            fits = largest is None or self._fits(largest)
            if fits:
                packed = self._pack(cuts=not whole_first)
                if packed is None and largest and self._fill(largest):
                    continue
                if packed is None and whole_first:
                    packed = self._pack(cuts=True)
            if packed is None:
                stuck = largest is None or not self._cut_tail(largest if fits else self._next(largest))
        return None if packed is None else self.slices + packed

    def _next(self, largest: Item) -> Item:
        """Return the item whose tail is cut off next, one of those that no rank can hold whole."""
        unplaced, order = self.unplaced, self.settings.order
        if order == "same":
            going_on = (item for item in unplaced.loose if item.piece.document in self.tails and not self._fits(item))
            return max(going_on, default=largest)
        if order == "largest":
            return largest
        smallest = largest
        for whole in reversed(unplaced.whole[unplaced.first : unplaced.last]):
            if self._fits(whole):
                break
            smallest = whole
        return min((item for item in unplaced.loose if item < smallest and not self._fits(item)), default=smallest)

    def _fits(self, item: Item) -> bool:
        """Return whether a rank can hold an item together with the shortest documents."""
        pairs_left = self.caps.most_pairs - item.pairs
        if pairs_left < 0 or item.tokens > self.most:
            return False
        return self.unplaced.least_pairs(max(self.needed - item.tokens, 0)) <= pairs_left

    def _pack(self, cuts: bool) -> Slices | None:
        """Return the slices of the remaining ranks, on which all items are packed, or `None` if that fails."""
        if self.pairs_left > self.ranks_left * self.caps.most_pairs:
            return None
        self.packs_left -= 1
        loads = {
            document: max(start, len(self.tails.get(document, ())) * (stop - start))
            for _, (document, start, stop), _ in self.unplaced.loose
        }
        scale = min(self.target, max(loads.values(), default=0)) or 1
        weights = {document: load * self.settings.load_weight / scale for document, load in loads.items()}
        shares, token_weight = self.shares[len(self.slices) :], self.settings.token_weight
        return pack(self.unplaced.ascending(), shares, self.caps.most_pairs, token_weight, weights, cuts)

    def _fill(self, item: Item) -> bool:
        """Fill the next rank with an item and other whole items, and return whether that worked.

        Other items are added largest first, as long as the shortest documents could fill the rest of the rank. A head
        fills the last tokens. If this would leave too many pairs to later ranks, nothing is changed.
        """
        unplaced, rank = self.unplaced, OpenRank(self)
        rank.hold(item)
        chosen = [item]
        for other in reversed(unplaced.ascending()):
            if other.tokens <= rank.tokens and other.pairs <= rank.pairs and other != item:
                if other.pairs + unplaced.least_pairs(max(rank.needed - other.tokens, 0)) <= rank.pairs:
                    chosen.append(other)
                    rank.hold(other)
        head, cut = rank.needed, None
        if head > 0:
            heads = unplaced.loose + unplaced.whole[unplaced.first : unplaced.last]
            uncut = [other for other in heads if other.piece.start == 0 and other.tokens > head]
            uncut = [other for other in uncut if other not in chosen]
            if not uncut or attention_pairs(0, head) > rank.pairs:
                return False
            cut = min(uncut, key=lambda other: other.tokens)
            rank.hold_slice(cut.piece.document, 0, head)
        if self.pairs_left - (self.caps.most_pairs - rank.pairs) > (self.ranks_left - 1) * self.caps.most_pairs:
            return False
        for taken in [*chosen, cut] if cut else chosen:
            unplaced.take(taken)
        if cut:
            unplaced.add(cut.piece.document, head, cut.piece.stop)
        self.close(rank)
        return True

    def _cut_tail(self, item: Item) -> bool:
        """Fill the next rank with the tail of an item, its own head, short documents and the head of another item.

        Returns whether that worked.
        """
        self.unplaced.take(item)
        rank = TailRank(self, item)
        rank.take_own_head()
        rank.take_short_documents()
        rank.take_leftovers()
        full = rank.take_head()
        if full:
            rank.take_tail()
            self.close(rank)
        return full
