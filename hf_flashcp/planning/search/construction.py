"""How one plan of the strategy "search" is built: giants peeled rank by rank, the rest packed whole.

Everything rests on one identity (derived from FlashCP eq. 3 and exact exchange): a document's traffic is the sum, over
its holders but the one of its last token, of the end of the holder's last slice. So peeling the tail [h, l) off a
document costs exactly h, whatever earlier tokens of it the same rank takes along ("own head"), and what is left
between own head and tail is one more item to place.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

from ...plan.slices import Slice, Slices, attention_pairs
from .pack import longest_tail, pack
from .unplaced import Budget, Item, Supply


def tail_beside_head(stop: int, head_start: int, tokens: int, pairs: int) -> int | None:
    """The longest tail of a document up to `stop` that fits in `pairs` together with a head that starts at
    `head_start` (of the same document or another), both together of exactly `tokens` tokens.

    Growing the tail by a token and shrinking the head by one adds `stop - head_start - tokens` pairs, a constant, so
    this is the solution of a linear equation.
    """
    slope = stop - head_start - tokens
    spare = pairs - attention_pairs(head_start, head_start + tokens)
    if spare < 0:
        return None
    return min(spare // slope, tokens) if slope > 0 else tokens


class Settings(NamedTuple):
    """What one construction does differently from others.

    Attributes:
        order (`str`): which item too large for a rank is peeled next: the `"largest"`, the `"same"` document as before
            until its rest fits, or the `"smallest"`.
        whole_first (`bool`): where items fit but cannot be packed, fill a rank with whole ones before cutting.
        token_weight (`float`): weight of tokens against pairs when whole items are packed.
        load_weight (`float`): weight of what a piece of a split document makes its rank send or receive.
        reserve (`float`): how many tokens of the shortest documents, in multiples of a rank's, are left to later ranks
            when a rank takes short documents beside a tail.
        filling (`float`): of what a peeling rank needs beside the tail, how much may be short documents.
    """

    order: str = "same"
    whole_first: bool = False
    token_weight: float = 2.0
    load_weight: float = 0.3
    reserve: float = 0.0
    filling: float = 1.0


class Construction:
    """One plan in the making.

    Args:
        target (`float`): the most that a rank should receive or send. Met by own heads in the place of fillers.
        before (`dict`, *optional*): `peeled` of an earlier construction: for each document the ends of what was left
            of it and the tails that were cut off, from which the number of its holders is foreseen.
        spreading (`float`): how much of the low positions to spread as heads, against what `before` suggests.
    """

    def __init__(
        self,
        budget: Budget,
        settings: Settings,
        target: float = math.inf,
        before: dict[int, list[tuple[int, int]]] | None = None,
        spreading: float = 1.0,
    ):
        self.budget, self.supply, self.settings = budget, Supply(budget), settings
        self.target, self.before, self.spreading = target, before or {}, spreading
        self.slices: Slices = []
        self.tokens_left, self.pairs_left = budget.total_tokens, budget.total_pairs
        self.peeled: dict[int, list[tuple[int, int]]] = {}

    def run(self) -> Slices | None:
        """Slices of every rank, or `None` where the settings lead nowhere."""
        whole_first = self.settings.whole_first
        while True:
            ranks_left = self.budget.cp_size - len(self.slices)
            largest = self.supply.largest()
            fits = largest is None or self._fits(largest)
            if fits:
                packed = self._pack(ranks_left, cuts=not whole_first)
                if packed is None and ranks_left > 1 and largest and self._fill(largest):
                    continue
                if packed is None and whole_first:
                    packed = self._pack(ranks_left, cuts=True)
                if packed is not None:
                    return self.slices + packed
            if ranks_left <= 1 or largest is None:
                return None
            if not self._peel(largest if fits else self._next(largest)):
                return None

    def _next(self, largest: Item) -> Item:
        """Which of the items that no rank can hold to peel."""
        supply = self.supply
        match self.settings.order:
            case "largest":
                return largest
            case "same":
                going_on = (item for item in supply.loose if item[1] in self.peeled and not self._fits(item))
                return max(going_on, default=largest)
        smallest = largest
        for index in range(supply.last - 1, supply.first - 1, -1):
            whole = supply.whole(index)
            if self._fits(whole):
                break
            smallest = whole
        return min((item for item in supply.loose if item < smallest and not self._fits(item)), default=smallest)

    def _tokens(self) -> tuple[int, int]:
        """The most and the least tokens of the next rank."""
        budget, closed = self.budget, len(self.slices)
        if not budget.token_room:
            tokens = budget.most_tokens - (closed >= budget.ranks_with_most)
            return tokens, tokens
        return budget.most_tokens, max(self.tokens_left - (budget.cp_size - closed - 1) * budget.most_tokens, 0)

    def _fits(self, item: Item) -> bool:
        """Whether a rank can hold an item, the shortest documents beside it."""
        pairs, _, start, stop = item
        tokens, needed = self._tokens()
        if pairs > self.budget.most_pairs or stop - start > tokens:
            return False
        return pairs + self.supply.least_pairs(max(needed - (stop - start), 0)) <= self.budget.most_pairs

    def _pack(self, ranks: int, cuts: bool) -> Slices | None:
        budget = self.budget
        if self.pairs_left > ranks * budget.most_pairs:
            return None
        more = max(budget.ranks_with_most - len(self.slices), 0)
        shares = [budget.most_tokens] * min(more, ranks) + [budget.most_tokens - 1] * (ranks - more)
        loads = {
            document: max(start, len(self.peeled.get(document, ())) * (stop - start))
            for _, document, start, stop in self.supply.loose
        }
        scale = min(self.target, max(loads.values(), default=0)) or 1
        weighted = {document: load * self.settings.load_weight / scale for document, load in loads.items()}
        return pack(self.supply.items(), shares, budget.most_pairs, self.settings.token_weight, weighted, cuts)

    def _closed(self, held: list[tuple[int, int, int]]) -> bool:
        self.slices.append([Slice(*piece) for piece in held])
        for _, start, stop in held:
            self.tokens_left -= stop - start
            self.pairs_left -= attention_pairs(start, stop)
        return True

    def _fill(self, item: Item) -> bool:
        """Closes a rank with an item and others, whole, the largest first as long as the shortest documents could fill
        what is left; a head at last. Gives up, changing nothing, where that leaves too many pairs to the others."""
        supply = self.supply
        tokens, needed = self._tokens()
        pairs = self.budget.most_pairs - item[0]
        tokens, needed = tokens - (item[3] - item[2]), needed - (item[3] - item[2])
        chosen = [item]
        for other in sorted(supply.items(), reverse=True):
            length = other[3] - other[2]
            if length <= tokens and other[0] <= pairs and other != item:
                if other[0] + supply.least_pairs(max(needed - length, 0)) <= pairs:
                    chosen.append(other)
                    pairs -= other[0]
                    tokens -= length
                    needed -= length
        cut = None
        if needed > 0:
            if attention_pairs(0, needed) > pairs:
                return False
            uncut = [item for item in supply.items() if item[2] == 0 and item[3] > needed and item not in chosen]
            if not uncut:
                return False
            cut = min(uncut, key=lambda item: item[3])
            pairs -= attention_pairs(0, needed)
        ranks_left = self.budget.cp_size - len(self.slices) - 1
        if self.pairs_left - (self.budget.most_pairs - pairs) > ranks_left * self.budget.most_pairs:
            return False
        for whole in chosen:
            supply.take(whole)
        held = [whole[1:] for whole in chosen]
        if cut:
            supply.take(cut)
            held.append((cut[1], 0, needed))
            supply.add(cut[1], needed, cut[3])
        return self._closed(held)

    def _peel(self, item: Item) -> bool:
        """Closes a rank with the tail of an item, its own head, the shortest documents and the head of another."""
        budget, supply = self.budget, self.supply
        supply.take(item)
        _, document, start, stop = item
        tokens, needed = self._tokens()
        pairs = budget.most_pairs
        peeled = self.peeled.setdefault(document, [])
        peels = len(peeled)
        held: list[tuple[int, int, int]] = []
        own = self._own_head(document, start, stop, tokens, peels)
        if own:
            held.append((document, start, start + own))
            pairs -= attention_pairs(start, start + own)
            start, tokens, needed = start + own, tokens - own, needed - own
        most_tail = max(int(self.target / peels), 1) if peels and self.target < math.inf else tokens
        tail = min(longest_tail(start, stop, pairs), tokens, most_tail)
        if tail < needed:
            fillers = self._fillers(document, start, stop, needed, pairs, most_tail)
            filled, filled_pairs = supply.held(*fillers)
            tail = min(longest_tail(start, stop, pairs - filled_pairs), tokens - filled, most_tail)
            unused = pairs - filled_pairs - attention_pairs(stop - tail, stop)
            if self.target == math.inf and unused > budget.most_pairs // 64:
                swapped = self._swapped(fillers, start, stop - tail, unused)
                if swapped:
                    head, head_pairs = supply.held(fillers[0], fillers[0] + swapped)
                    held.append((document, start, start + head))
                    filled_pairs += attention_pairs(start, start + head) - head_pairs
                    start += head
                    fillers = fillers[0] + swapped, fillers[1]
            held += [(filler, 0, budget.lengths[filler]) for filler in supply.documents[fillers[0] : fillers[1]]]
            supply.take_range(*fillers)
            tokens, needed, pairs = tokens - filled, needed - filled, pairs - filled_pairs
        while tail < needed:
            # What is left of documents that gave a head costs nothing more.
            leftover = supply.leftover(document, needed - tail, pairs)
            if leftover is None:
                break
            supply.take(leftover)
            held.append(leftover[1:])
            length = leftover[3] - leftover[2]
            tokens, needed, pairs = tokens - length, needed - length, pairs - leftover[0]
            tail = min(longest_tail(start, stop, pairs), tokens, most_tail)
        if tail < needed:
            wanted = (document, start, stop, needed, pairs, most_tail, own)
            choice = self._tail_and_head(*wanted, supply.heads()) or self._tail_and_head(*wanted, supply.loose)
            if choice is None:
                return False
            tail, other = choice
            head = needed - tail
            if other is None:
                held.append((document, start, start + head))
                start += head
            elif head:
                supply.take(other)
                held.append((other[1], other[2], other[2] + head))
                supply.add(other[1], other[2] + head, other[3])
        if tail:
            held.append((document, stop - tail, stop))
        peeled.append((stop - tail, tail))
        supply.add(document, start, stop - tail)
        return self._closed(held)

    def _fillers(self, document, start, stop, needed: int, pairs: int, most_tail: int) -> tuple[int, int]:
        """Which of the untouched documents, from one to another, leave too few tokens for the tail to fill."""
        supply = self.supply
        end = self._fillers_end(document)
        first, tokens_up_to, pairs_up_to = supply.first, supply.tokens_up_to, supply.pairs_up_to
        if self.settings.reserve:
            reserved = tokens_up_to[first] + self.settings.reserve * self.budget.most_tokens
            first = min(bisect_right(tokens_up_to, reserved, first, end + 1), end)
        up_to, too_many = first, end + 1
        while too_many - up_to > 1:
            middle = (up_to + too_many) // 2
            left = pairs - pairs_up_to[middle] + pairs_up_to[first]
            filled = tokens_up_to[middle] - tokens_up_to[first]
            tail = min(longest_tail(start, stop, left), most_tail) if left >= 0 else needed
            if filled <= self.settings.filling * (needed - tail):
                up_to = middle
            else:
                too_many = middle
        return first, up_to

    def _swapped(self, fillers: tuple[int, int], start: int, stop: int, pairs: int) -> int:
        """How many of the shortest fillers an own head from [start, stop) can replace for at most `pairs` more: the
        tail grows by whole tokens, and what pairs it leaves unused would be missing later."""
        supply, count, too_many = self.supply, 0, fillers[1] - fillers[0] + 1
        while too_many - count > 1:
            middle = (count + too_many) // 2
            head, head_pairs = supply.held(fillers[0], fillers[0] + middle)
            if start + head < stop and attention_pairs(start, start + head) - head_pairs <= pairs:
                count = middle
            else:
                too_many = middle
        return count

    def _tail_and_head(self, document, start, stop, needed, pairs, most_tail, own, others):
        """`(tail, other)`: tail and head of exactly `needed` tokens, the head from the document itself (`None`) or one
        of `others`, whichever keeps to the target and costs least."""
        peels, length = len(self.peeled[document]), stop - start
        choices = []
        if needed < length:
            tail = tail_beside_head(stop, start, needed, pairs)
            if tail is not None:
                tail = min(tail, most_tail)
                sent = tail * peels + (own + needed - tail) * self._receivers(document)
                choices.append((max(sent - self.target, 0), stop - tail, 0, tail, None))
        for other in others:
            _, other_document, other_start, other_stop = other
            head = needed - length
            if head > 0 and attention_pairs(start, stop) + attention_pairs(other_start, other_start + head) <= pairs:
                tail = length
            else:
                tail = tail_beside_head(stop, other_start, needed, pairs)
                if tail is None or tail > length:
                    continue
                tail = min(tail, most_tail)
                head = needed - tail
            if head < other_stop - other_start:
                cost = other_start + head + (stop - tail if tail < length else 0)
                sent = tail * peels + own * self._receivers(document) + head * self._receivers(other_document)
                choices.append((max(sent - self.target, 0), cost, 1, tail, other))
        if not choices:
            return None
        *_, tail, other = min(choices)
        return tail, other

    def _receivers(self, document: int) -> int:
        """How many ranks will need the head of a document, as far as one can tell."""
        return max(len(self.peeled.get(document, ())), len(self.before.get(document, ())), 1)

    def _low_positions(self, document: int, peels: int) -> float:
        """Tokens that, last time, ranks after the next one held of a document's low positions, which all others need,
        beyond what the target lets them send."""
        excess = 0.0
        for index, (_, tail) in enumerate(self.before.get(document, ())[peels + 1 :], peels + 1):
            excess += max(tail - self.target / index, 0)
        return excess * self.spreading

    def _own_head(self, document: int, start: int, stop: int, tokens: int, peels: int) -> int:
        """How much of its head a peeling rank should hold so that no rank receives or sends more than the target."""
        if self.target == math.inf:
            return 0
        before = self.before.get(document, ())
        receivers = max(len(before), peels + 1)
        tail = min(longest_tail(start, stop, self.budget.most_pairs), tokens)
        receiving = stop - tail - self.target
        sending = (self.target - peels * tail) / receivers
        last_end = before[-1][0] if before else 0
        to_spread = max(last_end - self.target / receivers, 0) * self.spreading
        to_spread += self._low_positions(document, peels) - start
        own = int(max(receiving, min(sending, to_spread), 0))
        return max(min(own, tokens - tail, stop - start - tail), 0)

    def _fillers_end(self, document: int) -> int:
        """Where the documents end that a rank may use as fillers: later ranks need some, lest they hold too much of
        this document's low positions."""
        supply = self.supply
        if self.target == math.inf:
            return supply.last
        up_to = supply.tokens_up_to
        most = up_to[supply.last] - self._low_positions(document, len(self.peeled[document]))
        return max(bisect_right(up_to, most, supply.first, supply.last + 1) - 1, supply.first)
