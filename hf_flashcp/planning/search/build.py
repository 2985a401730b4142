"""How one plan of the strategy "search" is built: tails cut off long documents rank by rank, the rest packed whole.

Everything rests on one identity (derived from FlashCP eq. 3 and exact exchange): a document's traffic is the sum, over
its holders but the one of its last token, of the end of the holder's last slice. So cutting the tail [h, l) off a
document costs exactly h, whatever earlier tokens of it the same rank takes along ("own head"), and what is left
between own head and tail is one more item to place.
"""

from __future__ import annotations

from ...plan.slices import Slices, attention_pairs
from ..caps import Item
from .pack import pack
from .tail import TailRank
from .unfinished import OpenRank, Unfinished


class Construction(Unfinished):
    """Builds one plan."""

    def run(self) -> Slices | None:
        """Slices of every rank, or `None` where the settings lead nowhere."""
        packed, stuck, whole_first = None, False, self.settings.whole_first
        while packed is None and not stuck:
            # The last rank takes all that is left, or the settings lead nowhere.
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
        """Which of the items that no rank can hold has its tail cut off."""
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
        """Whether a rank can hold an item, the shortest documents beside it."""
        pairs_left = self.caps.most_pairs - item.pairs
        if pairs_left < 0 or item.tokens > self.most:
            return False
        return self.unplaced.least_pairs(max(self.needed - item.tokens, 0)) <= pairs_left

    def _pack(self, cuts: bool) -> Slices | None:
        packed = None
        if self.pairs_left <= self.ranks_left * self.caps.most_pairs:
            loads = {
                document: max(start, len(self.tails.get(document, ())) * (stop - start))
                for _, (document, start, stop), _ in self.unplaced.loose
            }
            scale = min(self.target, max(loads.values(), default=0)) or 1
            weights = {document: load * self.settings.load_weight / scale for document, load in loads.items()}
            shares, token_weight = self.shares[len(self.slices) :], self.settings.token_weight
            packed = pack(self.unplaced.ascending(), shares, self.caps.most_pairs, token_weight, weights, cuts)
        return packed

    def _fill(self, item: Item) -> bool:
        """Closes a rank with an item and others, whole, the largest first as long as the shortest documents could fill
        what is left; a head at last. Gives up, changing nothing, where that leaves too many pairs to the others."""
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
        """Closes a rank with the tail of an item, its own head, the shortest documents and the head of another."""
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
