"""Packs whole items on ranks under the caps on tokens and attention pairs: the second half of a plan of "search"."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from ...plan.slices import Slices, attention_pairs
from ..caps import Item, assign_shares, item_of


_COMPARED = 16
"""The most items of a rank that are compared with items of another rank."""


def longest_tail(start: int, stop: int, pairs: int) -> int:
    """Return how many tokens from the end of [start, stop) have at most `pairs` attention pairs."""
    rest = stop * (stop + 1) // 2 - pairs
    if rest <= start * (start + 1) // 2:
        return stop - start
    # The shortest prefix h with h (h + 1) / 2 >= rest.
    return stop - ((math.isqrt(8 * rest - 7) - 1) // 2 + 1)


def pack(
    items: list[Item],
    shares: list[int],
    most_pairs: int,
    token_weight: float,
    kv_weights: dict[int, float],
    cuts: bool,
) -> Slices | None:
    """Pack whole items on empty ranks; return the slices of every rank, or `None` if that fails.

    Items are placed largest first. Swaps then bring each rank's pairs under the cap, and moves and swaps bring its
    tokens under its share.

    Args:
        items (`list[Item]`): the items, in ascending order.
        shares (`list[int]`): the most tokens of each rank, largest first.
        most_pairs (`int`): the most attention pairs of a rank.
        token_weight (`float`): weight of tokens against pairs when items are placed.
        kv_weights (`dict[int, float]`): weight of a piece of each split document, for the KV that it makes travel.
        cuts (`bool`): whether heads may be cut off items.
    """
    packing = Packing(shares, most_pairs, cuts)
    packing.place(items, token_weight, kv_weights)
    packing.lower_pairs()
    packed = max(rank.pairs for rank in packing.ranks) <= most_pairs and packing.equalize_tokens()
    return [[item.piece for item in rank.items] for rank in packing.ranks] if packed else None


class Load:
    """The items on one rank, and the most tokens that it may hold (`share`)."""

    __slots__ = ("items", "pairs", "share", "tokens")

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.pairs = self.tokens = self.share = 0

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.pairs += item.pairs
        self.tokens += item.tokens

    def remove(self, item: Item) -> None:
        self.items.remove(item)
        self.pairs -= item.pairs
        self.tokens -= item.tokens


class Swap(NamedTuple):
    """The items that one rank gives to another, and the item that it gets in return, if any."""

    receiver: Load
    given: list[Item]
    taken: Item | None


_pairs, _tokens = attrgetter("pairs"), attrgetter("tokens")


class Packing:
    """Items on ranks, which are moved between ranks until all ranks are under the caps."""

    def __init__(self, shares: list[int], most_pairs: int, cuts: bool):
        self.shares, self.most_pairs, self.cuts = shares, most_pairs, cuts
        self.ranks = [Load() for _ in shares]

    def place(self, items: list[Item], token_weight: float, kv_weights: dict[int, float]) -> None:
        """Place items by the rule "longest processing time first", on a weighted sum of pairs, tokens and KV."""
        pair_weight, token_weight = 1 / self.most_pairs, token_weight / self.shares[0]
        held = [rank.items for rank in self.ranks]
        loads = [(0.0, index) for index in range(len(self.ranks))]
        for item in reversed(items):
            weight = item.pairs * pair_weight + item.tokens * token_weight
            if kv_weights:
                weight += kv_weights.get(item.piece.document, 0.0)
            load, index = loads[0]
            heapq.heapreplace(loads, (load + weight, index))
            held[index].append(item)
        tokens = [sum(map(_tokens, rank.items)) for rank in self.ranks]
        for rank, rank_tokens, share in zip(self.ranks, tokens, assign_shares(self.shares, tokens)):
            rank.pairs, rank.tokens, rank.share = sum(map(_pairs, rank.items)), rank_tokens, share

    def lower_pairs(self) -> None:
        """Swap items of the rank with the most pairs for smaller ones until all ranks are under the cap or no swap
        helps."""
        for _ in range(2 * len(self.ranks)):
            donor = max(self.ranks, key=_pairs)
            if donor.pairs <= self.most_pairs:
                return
            swap = self._pair_swap(donor)
            if swap:
                _exchange(donor, swap)
            elif not self.cuts or not self._cut_for_pairs(donor, self.shares[0]):
                return

    def _pair_swap(self, donor: Load) -> Swap | None:
        """Return the swap with one of the ranks with the fewest pairs that most lowers the larger load of the two."""
        best, swap = donor.pairs, None
        mine = donor.items[:_COMPARED]
        given = np.array([[item.pairs] for item in mine])
        for receiver in heapq.nsmallest(4, self.ranks, key=_pairs):
            if receiver is donor:
                continue
            others = [None, *receiver.items[:_COMPARED]]
            change = given - np.array([0, *map(_pairs, others[1:])])
            peak = np.maximum(donor.pairs - change, receiver.pairs + change)
            peak[change <= 0] = donor.pairs
            place = int(peak.argmin())
            if peak.flat[place] < best:
                best, swap = (
                    peak.flat[place],
                    Swap(receiver, [mine[place // len(others)]], others[place % len(others)]),
                )
        return swap

    def _cut_for_pairs(self, donor: Load, share: int) -> bool:
        """Move a head from a rank without room for pairs to the rank with the most room; return whether that worked.

        The head leaves the donor below the cap, with room for the pairs of the tokens that it then lacks.
        """
        receiver = min(self.ranks, key=_pairs)
        room = self.most_pairs - receiver.pairs
        item = max(donor.items, key=lambda item: (-item.piece.start, item.piece.stop))
        _, start, stop = item.piece
        head = 0
        for _ in range(3):
            lacking = max(share - donor.tokens + head, 0)
            # The lacking tokens will be one head, or short documents with a quarter of the average pairs per token.
            over = donor.pairs - self.most_pairs + self.most_pairs // 64
            over += min(attention_pairs(0, lacking), lacking * self.most_pairs // (4 * share))
            longer = item.tokens - longest_tail(start, stop, item.pairs - min(over, room))
            if longer >= item.tokens:
                break
            head = longer
        if head and attention_pairs(start, start + head) > room:
            head -= 1
        if head > 0:
            _move_head(donor, item, head, receiver)
        return head > 0

    def equalize_tokens(self) -> bool:
        """Move and swap items until no rank has more tokens than its share; return whether that worked.

        Heads are moved only as a last resort.
        """
        cuts_left = len(self.ranks) if self.cuts else 0
        for _ in range(6 * len(self.ranks) + 12):
            excess = [rank.tokens - rank.share for rank in self.ranks]
            over = max(excess)
            if over <= 0:
                return True
            donor = self.ranks[excess.index(over)]
            receivers = sorted(range(len(excess)), key=excess.__getitem__)[:3]
            if not any(
                excess[rank] < 0 and self._give(donor, self.ranks[rank], min(over, -excess[rank]))
                for rank in receivers
            ):
                # The rank that lacks tokens has no room for pairs: it gives a head away to get short documents later.
                cuts_left -= 1
                neediest = self.ranks[receivers[0]]
                if cuts_left < 0 or not self._cut_for_pairs(neediest, neediest.share):
                    return False
        return False

    def _give(self, donor: Load, receiver: Load, owed: int) -> bool:
        """Move up to `owed` tokens from the donor to the receiver; return whether anything moved.

        The best of these is chosen: a whole item, a swap of two items, the head of an item, or several items for one.
        The moved tokens use at most a proportional part of the receiver's room for pairs.
        """
        room = self.most_pairs - receiver.pairs
        mine = sorted((item.tokens, item.pairs, item) for item in donor.items)
        best, swap = self._token_swap(donor, receiver, owed, mine)
        cuts = [item for tokens, _, item in mine if tokens > owed] if best < owed / 2 else []
        if cuts:
            cut = min(cuts, key=lambda item: item.piece[1:])
            start = cut.piece.start
            if attention_pairs(start, start + owed) <= room:
                _move_head(donor, cut, owed, receiver)
                return True
        swap = swap or self._several_against_one(donor, receiver, owed)
        if swap:
            _exchange(donor, swap)
        return swap is not None

    def _token_swap(
        self, donor: Load, receiver: Load, owed: int, mine: list[tuple[int, int, Item]]
    ) -> tuple[int, Swap | None]:
        """Return the move of one item, or the swap of two, that brings the receiver closest to the tokens it is owed.

        `mine` are the donor's items with their tokens and pairs, ascending. The result is the number of tokens that
        the receiver gains, and the swap, or `None` if nothing helps.
        """
        room, donor_room = self.most_pairs - receiver.pairs, self.most_pairs - donor.pairs
        best: int = 0
        given: Item | None = None
        taken: Item | None = None
        for tokens, pairs, item in mine:
            if best < tokens <= owed and pairs * owed <= room * tokens:
                best, given = tokens, item
        if best < owed:
            others = sorted((item.tokens, item.pairs, item) for item in receiver.items)[:_COMPARED]
            for tokens, pairs, item in mine[:_COMPARED]:
                for other_tokens, other_pairs, other in others:
                    gain = tokens - other_tokens
                    if gain <= best:
                        break
                    if gain <= owed and -donor_room <= pairs - other_pairs:
                        if (pairs - other_pairs) * owed <= room * gain:
                            best, given, taken = gain, item, other
        return best, Swap(receiver, [given], taken) if given else None

    def _several_against_one(self, donor: Load, receiver: Load, owed: int) -> Swap | None:
        """Return a swap of several items of the donor for one item of a receiver with little room for pairs.

        All but one of the donor's items are its shortest, so that the receiver gains tokens but hardly any pairs.
        """
        room, donor_room = self.most_pairs - receiver.pairs, self.most_pairs - donor.pairs
        mine = sorted(donor.items, key=_tokens)
        tokens_up_to = list(accumulate(map(_tokens, mine), initial=0))
        pairs_up_to = list(accumulate(map(_pairs, mine), initial=0))
        # Up to `most` items that are shorter than `first` are added to it. Without a `first`, at least one item stays.
        longest = range(max(len(mine) - _COMPARED, 0), len(mine))
        firsts = [(0, 0, len(mine) - 1, None), *((mine[at].tokens, mine[at].pairs, at, mine[at]) for at in longest)]
        best, swap = 0, None
        for other in receiver.items:
            most_tokens, most_pairs = owed + other.tokens, room + other.pairs
            for tokens, pairs, most, first in firsts:
                if tokens <= most_tokens and pairs <= most_pairs:
                    count = bisect_right(tokens_up_to, most_tokens - tokens, 0, most + 1)
                    count = bisect_right(pairs_up_to, most_pairs - pairs, 0, count) - 1
                    gained = tokens + tokens_up_to[count] - other.tokens
                    if gained > best and pairs + pairs_up_to[count] - other.pairs >= -donor_room:
                        best, swap = gained, (count, first, other)
        if swap:
            count, first, other = swap
        return Swap(receiver, [*mine[:count], *([first] if first else [])], other) if swap else None


def _exchange(donor: Load, swap: Swap) -> None:
    for item in swap.given:
        donor.remove(item)
        swap.receiver.add(item)
    if swap.taken:
        swap.receiver.remove(swap.taken)
        donor.add(swap.taken)


def _move_head(donor: Load, item: Item, head: int, receiver: Load) -> None:
    """Cut the first `head` tokens off an item of the donor and give them to the receiver."""
    document, start, stop = item.piece
    donor.remove(item)
    donor.add(item_of(document, start + head, stop))
    receiver.add(item_of(document, start, start + head))
